"""Fit flows to the four energies of Rezende and Mohamed (2015), and measure KL(q || p) exactly.

    python -m benchmarks.fits.energies [--quick | --full] [--seeds 3] [--rows REGEX] [--output FILE]
    python -m benchmarks.fits.energies --figure docs/energies.png

A row is ``family/K``: a flow of the registry with K layers, for couplings half-layers, under ``AutoFlow``
with its trainable affine map, on the Pyro models of ``pyro_flowvi.datasets.ENERGIES``.  Every family has
one setting (``SETTINGS``), the same for the four energies and for every K, found by trying a handful.
Training is ``CompiledSVI`` with Adam, whose rate falls to a hundredth along a cosine, in float32; the
target is annealed as in the paper: its log density is multiplied by a weight that rises from 0.01 to 1
within a part of the run. ``--no-anneal`` leaves that out.

KL(q || p) = E[log q + U] + log Z, in nats, on fresh draws, in float64, log q by the guide's ``log_prob``,
that is by the inverse of the flow; log Z is known by quadrature.  It is exact up to the standard error of
the mean, of which the table prints the largest of the row.  A KL below -3 standard errors would be a bug:
it is flagged, and the exit status is 1.  Figures are medians over the seeds, of the initial parameters and
the draws.

*ms* is a step of training, of all particles, in the compiled code; *compile* the seconds of the first two
calls of ``step``, eager checks included, warm where an earlier run has left its code on the disk; *seconds*
those of one run of training.  One graph serves the four energies: which one counts is an argument.

Targets, marked + (met) or - (missed): for each energy a KL of at most 0.02 nats by some row; for planar
flows a KL that falls in K on each energy.
"""

import argparse
import base64
import copy
import itertools
import math
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from benchmarks.common.pictures import save
from benchmarks.common.results import Clock, append, has, read, results_of
from pyro_flowvi import FLOWS, AutoFlow, CompiledSVI
from pyro_flowvi.datasets import ENERGIES, ENERGY_BOX

TARGET = 0.02
FIRST_WEIGHT, FINAL_RATE, CHUNKS = 0.01, 0.01, 100
GRID = 80
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How a family is trained.  ``anneal``: the part of the run in which the target's weight rises."""

    steps: int
    lr: float
    particles: int
    anneal: float
    init_scale: float = 1.0


SETTINGS = {
    # The layers' u and b are divided by K, so that what looks like a large rate is not.
    "planar": Setting(steps=20_000, lr=0.1, particles=256, anneal=0.5),
    "radial": Setting(steps=10_000, lr=0.1, particles=256, anneal=0.5),
    "nice": Setting(steps=4_000, lr=5e-3, particles=128, anneal=0.5),
    "realnvp": Setting(steps=6_000, lr=3e-3, particles=128, anneal=0.2),
    "neural_spline": Setting(steps=6_000, lr=1e-3, particles=128, anneal=0.2),
}
LAYERS = (2, 8, 32)
SLOW = [("nice", 32), ("realnvp", 32), ("neural_spline", 32)]
"""Rows that take minutes to compile, for little: left to ``--full``."""
QUICK = r"^(planar/(2|8)|realnvp/2)$"


def model(choice: Tensor, weight: Tensor) -> None:
    """The models of ENERGIES in one, so that one compiled step serves all: ``choice`` is one-hot."""
    z1 = pyro.sample("z1", dist.ImproperUniform(constraints.interval(*ENERGY_BOX), (), ()))
    z2 = pyro.sample("z2", dist.ImproperUniform(constraints.real, (), ()))
    z = torch.stack([z1, z2], -1)
    energies = torch.stack([energy(z) for energy in ENERGIES.values()], -1)
    pyro.factor("minus_energy", -weight * (energies * choice).sum(-1))


class Trainer:
    """One compiled step, with which guides of one family and K are trained, one after another."""

    def __init__(self, family: str, num_layers: int, setting: Setting) -> None:
        self.build, self.setting = partial(FLOWS[family], num_layers=num_layers), setting
        self.choice, self.weight = torch.eye(len(ENERGIES))[0].clone(), torch.ones(())
        pyro.clear_param_store()
        self.guide = self.fresh_guide(0)
        self.optim = pyro.optim.Adam({"lr": setting.lr})
        elbo = Trace_ELBO(num_particles=setting.particles, vectorize_particles=True, max_plate_nesting=0)
        self.svi = CompiledSVI(model, self.guide, self.optim, elbo, compile=True)
        start = time.perf_counter()
        for _ in range(2):
            self.svi.step(self.choice, self.weight)
        self.compile_seconds = time.perf_counter() - start

    def fresh_guide(self, seed: int) -> AutoFlow:
        pyro.set_rng_seed(seed)
        guide = AutoFlow(model, self.build, init_scale=self.setting.init_scale)
        return guide.materialize(self.choice, self.weight)

    @torch.no_grad()
    def start_anew(self, seed: int) -> None:
        """Puts parameters and Adam's moments back in place, which keeps the compiled step valid."""
        fresh = self.fresh_guide(seed)
        for param, first in zip(self.guide.parameters(), fresh.parameters(), strict=True):
            param.copy_(first)
        for optimizer in self.optim.optim_objs.values():
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def train(self, place: int, seed: int, anneal: bool = True) -> Arrays:
        """Trains on one energy; its seconds."""
        setting = self.setting
        self.start_anew(seed)
        self.choice.copy_(torch.eye(len(ENERGIES))[place])
        clock = Clock()
        for chunk in range(CHUNKS):
            done = (chunk + 0.5) / CHUNKS
            rate = FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))
            for optimizer in self.optim.optim_objs.values():
                optimizer.param_groups[0]["lr"] = setting.lr * rate
            risen = done / setting.anneal if anneal and setting.anneal else 1.0
            self.weight.fill_(min(1.0, FIRST_WEIGHT + (1.0 - FIRST_WEIGHT) * risen))
            self.svi.run(max(1, setting.steps // CHUNKS), self.choice, self.weight, progress=False)
        return clock.read()


@torch.no_grad()
def kl_divergence(guide: AutoFlow, name: str, num_draws: int) -> tuple[float, float]:
    """KL(q || p) on fresh draws, and its standard error."""
    energy, exact = ENERGIES[name], copy.deepcopy(guide).double()
    draws = exact.sample_posterior(num_draws)
    cost = exact.log_prob(draws) + energy(torch.stack([draws["z1"], draws["z2"]], -1))
    return cost.mean().item() + energy.log_normalizer, cost.std().item() / math.sqrt(num_draws)


def grid() -> Tensor:
    """Points of a square, as midpoints of cells, shape ``(GRID, GRID, 2)``, the first index that of z2."""
    ticks = ENERGY_BOX[0] + (ENERGY_BOX[1] - ENERGY_BOX[0]) * (torch.arange(GRID).double() + 0.5) / GRID
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)


@torch.no_grad()
def density(guide: AutoFlow) -> Any:
    z = grid()
    log_prob = copy.deepcopy(guide).double().log_prob({"z1": z[..., 0], "z2": z[..., 1]})
    return log_prob.exp().numpy().astype(np.float32)


def packed(picture: Any) -> Arrays:
    """A density in 256 steps, as text for a line of JSON."""
    highest = float(picture.max())
    levels = np.round(255.0 * picture / highest).astype(np.uint8)
    return {"highest": highest, "levels": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode()}


def unpacked(picture: Arrays) -> Any:
    """What :func:`packed` was given, to 1/255 of its highest value."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(picture["levels"])), dtype=np.uint8)
    return levels.reshape(GRID, GRID) * (picture["highest"] / 255.0)


def measure(family: str, num_layers: int, setting: Setting, options: argparse.Namespace) -> Arrays:
    """The figures of a row, and the densities of its median runs."""
    trainer = Trainer(family, num_layers, setting)
    row: Arrays = {"family": family, "K": num_layers, **asdict(setting), "compile": trainer.compile_seconds}
    row |= {"parameters": sum(param.numel() for param in trainer.guide.parameters()), "energies": {}}
    pictures = {}
    for place, name in enumerate(ENERGIES):
        runs = []
        for seed in range(options.seeds):
            taken = trainer.train(place, seed, not options.no_anneal)
            kl, error = kl_divergence(trainer.guide, name, options.draws)
            runs.append({"seed": seed, "kl": kl, "se": error, **taken})
            pictures[name, seed] = density(trainer.guide)
        middle = sorted(runs, key=lambda run: run["kl"])[(len(runs) - 1) // 2]
        row["energies"][name] = {
            "kl": float(np.median([run["kl"] for run in runs])),
            "se": max(run["se"] for run in runs),
            "seconds": float(np.median([run["seconds"] for run in runs])),
            "cpu_seconds": float(np.median([run["cpu_seconds"] for run in runs])),
            "bug": any(run["kl"] < -3.0 * run["se"] for run in runs),
            "runs": runs,
        }
        pictures[name] = pictures[name, middle["seed"]]
    for name in ("seconds", "cpu_seconds"):
        row[name] = float(np.median([figures[name] for figures in row["energies"].values()]))
    row["ms"] = 1e3 * row["seconds"] / setting.steps
    row["pictures"] = {name: packed(pictures[name]) for name in ENERGIES}
    return row


def draw(results: Path, path: Path) -> None:
    """True densities, then fitted ones: all K of planar flows, of the other families the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read(results) if not row["quick"]]
    largest = {row["family"]: row["K"] for row in rows}
    shown = [row for row in rows if row["family"] == "planar" or row["K"] == largest[row["family"]]]
    size = (1.45 * (len(shown) + 1), 1.6 * len(ENERGIES))
    figure, axes = pyplot.subplots(len(ENERGIES), len(shown) + 1, figsize=size, squeeze=False)
    for line, (name, energy) in zip(axes, ENERGIES.items(), strict=True):
        true = (-energy(grid()) - energy.log_normalizer).exp().numpy()
        style = {"origin": "lower", "cmap": "magma", "vmin": 0.0, "vmax": true.max()}
        for axis in line:
            axis.set(xticks=[], yticks=[])
        line[0].imshow(true, **style)
        line[0].set_ylabel(name, fontsize=11)
        for axis, row in zip(line[1:], shown, strict=True):
            axis.imshow(unpacked(row["pictures"][name]), **style)
            axis.set_xlabel(f"KL {row['energies'][name]['kl']:.3f}", fontsize=8, labelpad=2)
    for axis, title in zip(axes[0], ["true", *(f"{r['family']}, {r['K']}" for r in shown)], strict=True):
        axis.set_title(title.replace("neural_", ""), fontsize=9)
    figure.tight_layout(pad=0.3)
    save(figure, path, results, dpi=80)


def targets(rows: list[Arrays]) -> list[str]:
    lines = []
    for name in ENERGIES:
        best = min(rows, key=lambda row: row["energies"][name]["kl"])
        kl = best["energies"][name]["kl"]
        lines.append(
            f"{name}: best KL {kl:.4f} by {best['family']}/{best['K']} {'+' if kl <= TARGET else '-'}"
        )
        falling = [row["energies"][name]["kl"] for row in rows if row["family"] == "planar"]
        if len(falling) > 1:
            falls = all(a > b for a, b in itertools.pairwise(falling))
            steps = " > ".join(f"{kl:.3f}" for kl in falling)
            lines[-1] += f"; planar by K: {steps} {'+' if falls else '-'}"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="regular expression: only rows whose name it matches")
    parser.add_argument("--quick", action="store_true", help="three small rows, a tenth of the steps")
    parser.add_argument("--full", action="store_true", help="couplings with K = 32 as well")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row and energy")
    parser.add_argument("--draws", type=int, default=50_000, help="for the KL")
    parser.add_argument("--no-anneal", action="store_true", help="the target itself from the first step")
    parser.add_argument("--output", type=Path, default=results_of("energies"))
    parser.add_argument("--figure", type=Path, help="draw the densities of the results, and fit nothing")
    options = parser.parse_args()
    if options.figure is not None:
        draw(options.output, options.figure)
        return
    torch.set_num_threads(1)
    options.seeds = 1 if options.quick else options.seeds
    names = [
        (family, num_layers)
        for family, num_layers in itertools.product(SETTINGS, LAYERS)
        if re.search(QUICK if options.quick else options.rows, f"{family}/{num_layers}")
        and (options.full or (family, num_layers) not in SLOW)
    ]
    print(f"KL(q || p) in nats, median of {options.seeds} seeds, {options.draws:,} draws, float32, ", end="")
    print(f"1 thread, torch {torch.__version__}.\n")
    columns = ("family", "K", "parameters", *ENERGIES, "largest s.e.", "compile", "steps", "seconds", "ms")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    start, rows, bugs = time.perf_counter(), [], []
    for family, num_layers in names:
        setting = asdict(SETTINGS[family])
        if options.quick:
            setting["steps"] //= 10
        key = {"family": family, "K": num_layers, "seeds": options.seeds, "draws": options.draws}
        key |= {"quick": options.quick, "annealed": not options.no_anneal}
        if has(read(options.output), key):
            continue
        row = append(options.output, key | measure(family, num_layers, Setting(**setting), options))
        rows.append(row)
        results = row["energies"].values()
        cells = (family, num_layers, row["parameters"], *(f"{result['kl']:.4f}" for result in results))
        cells += (f"{max(r['se'] for r in results):.4f}", f"{row['compile']:.1f}", row["steps"])
        print(f"| {' | '.join(map(str, cells))} | {row['seconds']:.1f} | {row['ms']:.3f} |", flush=True)
        bugs += [f"{family}/{num_layers} on {name}" for name, r in row["energies"].items() if r["bug"]]
    if rows:
        print("\n" + "\n".join(targets(rows)))
    print(f"{time.perf_counter() - start:.0f} s in all")
    if bugs:
        sys.exit(f"a KL below -3 standard errors, which is a bug: {', '.join(bugs)}")


if __name__ == "__main__":
    main()
