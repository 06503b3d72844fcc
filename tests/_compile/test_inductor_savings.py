"""What compilation saves, and that it leaves torch as it was."""

import threading

import torch

from pyro_flowvi._compile.inductor import lower
from pyro_flowvi._compile.inductor_savings import fast_inductor
from pyro_flowvi._compile.torch_private import private


def test_torch_is_as_before() -> None:
    isa, dtypes, config = private("VecISA"), private("DtypePropagationOpsHandler"), private("config")
    before = isa.check_build, dtypes.__init__, config.pattern_matcher
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with fast_inductor():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    with fast_inductor():  # overlapping, as the thread that warms up does
        leave.set()
        thread.join()
    assert (isa.check_build, dtypes.__init__, config.pattern_matcher) == before


def test_nothing_is_probed(monkeypatch) -> None:
    def probe(isa: object, code: str) -> bool:
        raise AssertionError("a probe was compiled")

    monkeypatch.setattr(private("VecISA"), "_probe_load", probe)
    x = torch.randn(3)
    (y,) = lower(lambda value: (value.exp() + 1.0,), [x], 0)(x)
    torch.testing.assert_close(y.clone(), x.exp() + 1.0)
