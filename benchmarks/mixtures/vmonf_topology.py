"""What a mixture of flows does without a clustering to start from, and with too many components.

    python -m benchmarks.mixtures.vmonf_topology [--tests rings ...] [--seeds 5] [--output FILE]

- ``rings``: two circles, no labels; components over ``PolarNormal`` from many random starts at once;
- ``normal``: the same with splines over a normal base;
- ``arcs``: the same with sixteen small components, of which a map by their overlap makes two classes;
- ``wings``: five wings of a pinwheel, no labels, from many random starts;
- ``merged``, ``merged random``: twelve components on five wings, started by k-means or at random rows, then
  ``annihilate``, then trained on;
- ``consistency``: two circles, with 32 labels and without, 600 steps from random components, with and
  without a consistency loss.

Accuracy (best one-to-one matching) and NLL are those of a fresh draw.  Rows go to the file one by one, and a
run that was stopped goes on.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from torch import Tensor

from benchmarks.common.results import Clock, append, has, read, results_of
from benchmarks.mixtures.vmonf import matched_accuracy
from pyro_flowvi.datasets import hide_labels, pinwheel, two_circles
from pyro_flowvi.distributions import PolarNormal
from pyro_flowvi.models import VMoNF, annihilate, class_map_by_overlap, multistart, ring_flow
from pyro_flowvi.models.mixture._partitions import cluster_gaussians, warm_starts
from pyro_flowvi.models.mixture._training import MixtureTrainer, TrainingRows


class Data:
    """Standardised points, their classes, and a fresh draw to test on."""

    def __init__(self, draw: Callable[..., Any], seed: int) -> None:
        (x, self.y), (fresh, self.test_y) = draw(seed=seed), draw(seed=seed + 10_000)
        centre, scale = x.mean(0), x.std(0)
        self.x, self.fresh = (torch.tensor((each - centre) / scale).float() for each in (x, fresh))
        self.shift = float(np.log(scale).sum())

    def scores(self, model: VMoNF, classes: Any = None) -> dict[str, Any]:
        with torch.no_grad():
            joint = model.joint_log_prob(self.fresh)
        found = joint.argmax(-1).numpy()
        found = found if classes is None else np.asarray(classes)[found]
        nll = self.shift - float(joint.logsumexp(-1).mean())
        accuracy = matched_accuracy(self.test_y, found)
        return {"components": model.num_components, "accuracy": accuracy, "nll": nll}


def train(model: VMoNF, x: Tensor, steps: int, parts: Tensor | None = None, **options: Any) -> None:
    rows = TrainingRows.free(x, model.num_components)
    rows = rows if parts is None else replace(rows, parts=parts)
    trainer = MixtureTrainer(model, **options)
    trainer.run(rows, steps, from_start=parts is not None)
    trainer.release()


def rings(seed: int) -> dict[str, Any]:
    data, model = Data(two_circles, seed), VMoNF(2, 2, flow=ring_flow, base=PolarNormal(2))
    multistart(model, data.x, seed=seed)
    train(model, data.x, 1200, noise=(0.1, 0.001))
    return data.scores(model)


def normal(seed: int) -> dict[str, Any]:
    data, model = Data(two_circles, seed), VMoNF(2, 2, "neural_spline", num_layers=4, hidden=(32,))
    multistart(model, data.x, seed=seed)
    train(model, data.x, 1200)
    return data.scores(model)


def arcs(seed: int) -> dict[str, Any]:
    data, model = Data(two_circles, seed), VMoNF(16, 2, num_layers=2, hidden=(16,))
    model.place(data.x[torch.randperm(len(data.x))[:16]], 0.4 * torch.eye(2).expand(16, 2, 2))
    train(model, data.x, 2500, noise=(0.15, 0.001))
    return data.scores(model, class_map_by_overlap(model, data.x, 2))


def wings(seed: int) -> dict[str, Any]:
    data, model = Data(pinwheel, seed), VMoNF(5, 2, num_layers=6, hidden=(16,))
    multistart(model, data.x, seed=seed)
    train(model, data.x, 1000)
    return data.scores(model)


def merged(seed: int, start: str = "kmeans") -> dict[str, Any]:
    data, model = Data(pinwheel, seed), VMoNF(12, 2, num_layers=6, hidden=(16,))
    x, unknown = data.x.double().numpy(), np.full(len(data.x), -1)
    (parts,) = warm_starts([start], x, unknown, 12, np.random.RandomState(seed)).values()
    model.place(*(torch.as_tensor(each).float() for each in cluster_gaussians(x, np.eye(12)[parts])))
    train(model, data.x, 400, torch.as_tensor(parts))
    left = annihilate(model, data.x)
    print(left)
    train(left.model, data.x, 1000, lr=3e-3, noise=(0.05, 0.005))
    return data.scores(left.model)


def merged_random(seed: int) -> dict[str, Any]:
    return merged(seed, "random")


def consistency(seed: int, labels: int, weight: float) -> dict[str, Any]:
    data = Data(two_circles, seed)
    options: dict[str, Any] = {"consistency": weight, "consistency_ramp": 200}
    model = VMoNF(2, 2, "neural_spline", num_layers=4, hidden=(32,), **options)
    y = torch.as_tensor(hide_labels(data.y, labels, seed)) if labels else torch.full((len(data.x),), -1)
    optim = pyro.optim.ClippedAdam({"lr": 4e-3, "lrd": 0.998, "clip_norm": 5.0})
    svi = SVI(model.model, model.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    known = torch.nonzero(y >= 0).flatten()
    for step in range(600):
        index = torch.cat([known, torch.randint(len(y), (256,))])
        svi.step(data.x[index], y[index], step=torch.tensor(float(step)))
    return data.scores(model)


TESTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "rings": rings,
    "normal": normal,
    "arcs": arcs,
    "wings": wings,
    "merged": merged,
    "merged random": merged_random,
    "consistency, 32 labels, w = 0": lambda seed: consistency(seed, 16, 0.0),
    "consistency, 32 labels, w = 1": lambda seed: consistency(seed, 16, 1.0),
    "consistency, no labels, w = 0": lambda seed: consistency(seed, 0, 0.0),
    "consistency, no labels, w = 1": lambda seed: consistency(seed, 0, 1.0),
}


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="names, or their beginnings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results_of("vmonf_topology"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = read(args.output)
    for name, test in TESTS.items():
        for seed in range(args.seeds) if name.startswith(tuple(args.tests)) else ():
            if has(done, {"test": name, "seed": seed}):
                continue
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            clock = Clock()
            done.append(append(args.output, {"test": name, "seed": seed, **test(seed), **clock.read()}))
            print(done[-1], flush=True)
    print("\n| test | seeds | components | accuracy | range | NLL | seconds |\n|---|---|---|---|---|---|---|")
    for name in TESTS:
        rows = [row for row in done if row["test"] == name]
        if rows:
            found = sorted(row["accuracy"] for row in rows)
            nll, seconds = (statistics.median(row[key] for row in rows) for key in ("nll", "cpu_seconds"))
            left = ", ".join(str(row["components"]) for row in rows)
            spread = f"{statistics.median(found):.3f} | {found[0]:.3f} to {found[-1]:.3f}"
            print(f"| {name} | {len(rows)} | {left} | {spread} | {nll:.3f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
