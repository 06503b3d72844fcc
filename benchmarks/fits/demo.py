"""The table of ``python -m pyro_flowvi demo``: centred eight schools with four guides, over several seeds.

    python -m benchmarks.fits.demo [--seeds 3] [--steps 4000] [--output FILE]

Errors of the means are against the reference that the package has, which ``eight_schools_reference.py``
makes; of the seconds, those of a fit, verdicts apart, are wall seconds, and those of the whole demo are also
CPU seconds.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.common.results import Clock, append, has, read, results_of
from pyro_flowvi.demo import NUM_STEPS, run_demo, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--output", type=Path, default=results_of("demo"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        if has(read(options.output), {"seed": seed, "steps": options.steps}):
            continue
        clock = Clock()
        rows = run_demo(num_steps=options.steps, seed=seed, progress=False)
        whole = {f"demo_{name}": value for name, value in clock.read().items()}
        print(f"seed {seed}\n{table(rows)}\n", flush=True)
        for row in rows:
            found = row.diagnosis
            figures = {"elbo": found.elbo, "elbo_se": found.elbo_se, "khat": found.khat}
            figures |= {"verdict": found.verdict, "reasons": list(found.reasons)}
            figures |= {"worst_mean": row.error, "seconds": row.seconds, **whole}
            append(options.output, {"guide": row.name, "seed": seed, "steps": options.steps, **figures})


if __name__ == "__main__":
    main()
