"""The balance of complexities in an amortised mixture of flows: which components survive, and why.

    python -m benchmarks.mixtures.vmonf_complexity [--seeds 5] [--steps 2000] [--output FILE]

Five wings of a pinwheel, no labels and no warm start.  The published training is amortised: components and a
classifier q(c | x) learn together, and what a strong component takes first it keeps.  Rows differ in the
sizes of q and of the flows, in the layers that the components share, and in whether there is a q at all.
*Alive* counts components with more than 2 % of the responsibilities; *gap* is the mean KL(q(c | x) ‖ p(c |
x)) in nats; NLL and accuracy (best one-to-one matching) are those of a fresh draw.  Rows go to the file one
by one, and a run that was stopped goes on.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import TraceEnum_ELBO

from benchmarks.common.results import Clock, append, has, read, results_of
from benchmarks.mixtures.vmonf import matched_accuracy
from pyro_flowvi.datasets import pinwheel
from pyro_flowvi.infer import CompiledSVI
from pyro_flowvi.models import VMoNF

SMALL, LARGE = {"num_layers": 2, "hidden": (4,)}, {"num_layers": 8, "hidden": (16,)}
ROWS: dict[str, dict[str, Any]] = {
    "large flows, q 1 x 3": {**LARGE, "inference": "amortized", "classifier": (3,)},
    "large flows, q 2 x 64": {**LARGE, "inference": "amortized", "classifier": (64, 64)},
    "small flows, q 1 x 3": {**SMALL, "inference": "amortized", "classifier": (3,)},
    "small flows, q 2 x 64": {**SMALL, "inference": "amortized", "classifier": (64, 64)},
    "2 own and 6 shared layers, q 2 x 64": {
        **LARGE,
        "num_layers": 2,
        "shared_layers": 6,
        "inference": "amortized",
        "classifier": (64, 64),
    },
    "large flows, exact": LARGE,
    "2 own and 6 shared layers, exact": {**LARGE, "num_layers": 2, "shared_layers": 6},
    "small flows, exact": SMALL,
}


def attempt(options: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x, test = (pinwheel(seed=1000 * half + seed) for half in (1, 2))
    mean, scale = x[0].mean(0), x[0].std(0)
    rows, fresh = (torch.tensor((points - mean) / scale, dtype=torch.float32) for points, _ in (x, test))
    vmonf = VMoNF(5, 2, **options)
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 4e-3}, "gamma": 0.999}
    )
    svi = CompiledSVI(vmonf.model, vmonf.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    clock = Clock()
    for _ in range(steps):
        svi.step(rows[torch.randint(len(rows), (512,))], size=len(rows))
    taken = clock.read()
    with torch.no_grad():
        p, nll = vmonf.responsibilities(fresh), -vmonf.log_prob(fresh).mean()
        gap = 0.0
        if vmonf.inference == "amortized":
            q = vmonf.classify(fresh)
            gap = float((q * (q.clamp_min(1e-30).log() - p.clamp_min(1e-30).log())).sum(-1).mean())
    return {
        "accuracy": matched_accuracy(test[1], p.argmax(-1).numpy()),
        "nll": float(nll + np.log(scale).sum()),
        "alive": int((p.mean(0) > 0.02).sum()),
        "gap": gap,
        **taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=results_of("vmonf_complexity"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = [row for row in read(args.output) if row["steps"] == args.steps]
    for seed in range(args.seeds):
        for name, options in ROWS.items():
            key = {"name": name, "seed": seed, "steps": args.steps}
            if not has(done, key):
                done.append(append(args.output, {**key, **attempt(options, seed, args.steps)}))
                print(done[-1], flush=True)
    print("\n| components | seeds | accuracy | NLL | alive | gap | seconds |\n|---|---|---|---|---|---|---|")
    for name in ROWS:
        rows = [row for row in done if row["name"] == name]
        if rows:
            middle = {
                key: statistics.median(row[key] for row in rows)
                for key in ("accuracy", "nll", "alive", "gap", "seconds")
            }
            figures = f"{middle['accuracy']:.3f} | {middle['nll']:.3f} | {middle['alive']:g}"
            print(f"| {name} | {len(rows)} | {figures} | {middle['gap']:.3f} | {middle['seconds']:.0f} |")


if __name__ == "__main__":
    main()
