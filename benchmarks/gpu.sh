#!/usr/bin/env bash
# Tests and measurements on one GPU, in ten minutes, with nothing installed by hand.
#
#     benchmarks/gpu.sh [--device cuda|cpu] [--quick]
#
# With --device cpu --quick the same code runs in small sizes on any machine.  PYTHON names an interpreter that
# has the test dependencies; without it, the Makefile makes .venv.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda
quick=()
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device=${2:?--device needs a name}; shift 2 ;;
        --quick) quick=(--quick); shift ;;
        *) echo "gpu.sh: unknown option $1" >&2; exit 2 ;;
    esac
done

if [ -z "${PYTHON:-}" ]; then
    make .venv/.test || exit 1
    PYTHON=.venv/bin/python
fi

failed=0
# Tests first, but not for more than a third of the time.
timeout 200 "$PYTHON" -m pytest -q -m cuda --device "$device" tests/test_cuda.py tests/_compile/test_svi.py || failed=1
timeout 390 "$PYTHON" -m benchmarks.gpu.run --device "$device" "${quick[@]}" || failed=1
exit $failed
