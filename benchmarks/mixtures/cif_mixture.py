"""Continuously-indexed flows on targets with islands and holes, beside the flows that they are made from.

    python -m benchmarks.mixtures.cif_mixture [--targets nine ...] [--layers 5 ...] [--bases 0.1 ...]
        [--seeds 3] [--steps 5000] [--particles 1000] [--output cif.jsonl] [--shard 0/2]
    python -m benchmarks.mixtures.cif_mixture --chosen         # few layers, bases far off, and the defaults
    python -m benchmarks.mixtures.cif_mixture --speed          # milliseconds a step
    python -m benchmarks.mixtures.cif_mixture --report cif.jsonl [--figure docs/cif_mixture.png]

The targets are normalised, so that the best ELBO is 0: nine or sixteen normals of standard deviation .25 on a
lattice of step 2 (Caterini, Cornish, Sejdinovic and Doucet 2020), where one mode alone gives
-log K; two rings; in four dimensions, sixteen normals at the corners of a cube.

The guides have five layers (or as many as the row says) and *equal numbers of parameters*, to a percent:

- *nsf*: autoregressive rational-quadratic spline layers;
- *nsf + affine*: each followed by a free elementwise affine map, as the layers of a CIF have it;
- *cif*: the same made continuously indexed, one index a layer.

The base of these is normal with standard deviation σ0, fixed, or trained from 1, and the guide's own affine
map is off: with it, in *cif, default*, *nsf, default* and *realnvp, default*, any flow rescales itself.
"Tempered": the weight of the target rises from .1 to 1 over the first 30 % of the steps.  All are trained
alike, with the gradient of ``Trace_ELBO``; the defaults by ``fit`` with nothing set.

Of a fit the table says the ELBO (of a CIF, the auxiliary ELBO, a lower bound on it), the masses of the
lightest and the heaviest mode, counted within 3 standard deviations, also of draws resampled by their
weights, and the share of all draws that lie within 3 of a mode.
"""

import argparse
import itertools
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import pyro_flowvi
from benchmarks.common.pictures import packed, save, unpacked
from benchmarks.common.results import Clock, Row, collect, read, results_of
from benchmarks.common.tables import markdown, median, number
from pyro_flowvi import AutoCIF, AutoFlow, AutoRealNVP, CompiledSVI
from pyro_flowvi.datasets import NINE_MODES, NormalLattice
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.infer import TraceAnnealed_ELBO
from pyro_flowvi.transforms import Compose, ElementwiseAffine, FlowTransform

STEPS, PARTICLES, LR = 5000, 1000, 4e-3
NUM_DRAWS = 100_000
HIDDEN = 32
"""Width of the two hidden layers of a CIF's conditioners; the others' are as wide as the count allows."""
FIRST_WEIGHT, TEMPERED = 0.1, 0.3
BINS = 100
FLOW_NAMES = ("nsf", "nsf + affine", "cif")
DEFAULT_NAMES = ("cif, default", "nsf, default", "realnvp, default")
BASES = ("0.1", "1", "10", "trained")
CHOSEN = (
    ("nine", 1, "trained", False),
    ("nine", 2, "trained", False),
    ("nine", 5, "0.1", False),
    ("nine", 5, "10", False),
    ("nine", 5, "1", True),
    ("rings", 2, "trained", False),
    ("cube", 5, "trained", False),
    ("cube", 5, "trained", True),
)
"""Target, layers, base and tempering of what the page of results has, with fewer steps of fewer draws."""


# -- targets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rings:
    """Circles around the origin, of equal mass; the density is normal across them."""

    radii: tuple[float, ...] = (1.5, 3.5)
    sd: float = 0.15
    dim: int = 2

    @property
    def reach(self) -> float:
        return max(self.radii) + 4.0 * self.sd

    def log_prob(self, z: Tensor) -> Tensor:
        radii = torch.tensor(self.radii)
        across = -0.5 * ((z.norm(dim=-1, keepdim=True) - radii) / self.sd).square()
        # The mass of a ring: 2π ∫ r exp(-(r - R)² / 2 sd²) dr, whose lower end is 10 sd away.
        masses = 2.0 * math.pi * radii * self.sd * math.sqrt(2.0 * math.pi)
        return (across - masses.log()).logsumexp(-1) - math.log(len(radii))

    def masses(self, z: Tensor) -> Tensor:
        distance = (z.norm(dim=-1, keepdim=True) - torch.tensor(self.radii)).abs()
        return (distance < 3.0 * self.sd).to(z).mean(0)


TARGETS: dict[str, NormalLattice | Rings] = {
    "nine": NINE_MODES,
    "sixteen": NormalLattice((-3.0, -1.0, 1.0, 3.0)),
    "rings": Rings(),
    "cube": NormalLattice((-2.0, 2.0), dim=4, sd=0.5),
}


def model(target: NormalLattice | Rings) -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (target.dim,)))
    pyro.factor("log_density", target.log_prob(z))


# -- guides ------------------------------------------------------------------------------------------


class Base(FlowTransform):
    """Gives a standard normal the scale σ0, one number, fixed or trained."""

    def __init__(self, dim: int, base: str) -> None:
        super().__init__(dim)
        trained = base == "trained"
        log_scale = torch.tensor(0.0 if trained else math.log(float(base)))
        self.log_scale = nn.Parameter(log_scale, requires_grad=trained)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.dim * self.log_scale.expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y * (-self.log_scale).exp(), -self.dim * self.log_scale.expand(y.shape[:-1])


class BasedCIF(AutoCIF):
    """A CIF of which the first index network sees the base as it is scaled."""

    def __init__(self, *args: Any, base: str, **options: Any) -> None:
        super().__init__(*args, affine=None, **options)
        self._base = base

    def _layers(self) -> list[Any]:
        return [Base(self.latent_dim, self._base), *super()._layers()]


def spline_flow(dim: int, base: str, num_layers: int, width: int, affine: bool) -> Compose:
    layers = FLOWS["neural_spline_ar"](dim, num_layers=num_layers, hidden=(width, width))
    splines = [layer for layer in layers if not isinstance(layer, ElementwiseAffine)]
    parts: list[Any] = [Base(dim, base)]
    for layer in splines:
        parts += [layer, ElementwiseAffine(dim)] if affine else [layer]
    return Compose(parts)


def make_guide(key: Row, width: int = HIDDEN) -> AutoFlow:
    """The guide of a row, with its conditioners as wide as told."""
    target, flow = TARGETS[key["target"]], key["flow"]
    program, base, layers = partial(model, target), key["base"], key["layers"]
    if flow == "cif, default":
        return AutoCIF(program).materialize()
    if flow == "realnvp, default":
        return AutoRealNVP(program).materialize()
    if flow == "nsf, default":
        return AutoFlow(program, "neural_spline_ar").materialize()
    if flow == "cif":
        options: dict[str, Any] = {"hidden": (width, width), "base": base, "index_scale": 0.0}
        return BasedCIF(program, num_layers=layers, **options).materialize()
    affine = flow == "nsf + affine"
    build = partial(spline_flow, base=base, num_layers=layers, width=width, affine=affine)
    return AutoFlow(program, build, affine=None).materialize()


def count(guide: AutoFlow) -> int:
    return sum(param.numel() for param in guide.parameters() if param.requires_grad)


def matched_guide(key: Row) -> AutoFlow:
    """The guide of a row, with as many parameters as a CIF of its depth has."""
    if key["flow"] not in FLOW_NAMES or key["flow"] == "cif":
        return make_guide(key)
    goal = count(make_guide({**key, "flow": "cif"}))
    width = min(range(HIDDEN, 2 * HIDDEN), key=lambda width: abs(count(make_guide(key, width)) - goal))
    pyro.set_rng_seed(key["seed"])
    return make_guide(key, width)


# -- training ----------------------------------------------------------------------------------------


def objective(tempered: bool, num_steps: int, particles: int = PARTICLES) -> TraceAnnealed_ELBO:
    """The ELBO, with the weight of the target rising at first if it is tempered."""

    def schedule(step: int) -> float:
        risen = step / (TEMPERED * num_steps)
        return min(1.0, FIRST_WEIGHT + (1.0 - FIRST_WEIGHT) * risen) if tempered else 1.0

    return TraceAnnealed_ELBO(
        schedule, path=False, num_particles=particles, vectorize_particles=True, max_plate_nesting=0
    )


def fit_one(key: Row) -> Row:
    """Trains one guide and looks at its draws."""
    target = TARGETS[key["target"]]
    pyro.set_rng_seed(key["seed"])
    guide = matched_guide(key)
    program = partial(model, target)
    clock = Clock()
    if key["flow"] in FLOW_NAMES:
        loss = objective(key["tempered"], key["steps"], key["particles"])
        options: dict[str, Any] = {"loss": loss, "lr": LR, "num_steps": key["steps"], "compile": True}
    else:
        options = {}
    result = pyro_flowvi.fit(program, guide, seed=key["seed"], progress=False, **options)
    taken = clock.read()
    with torch.no_grad():
        z, bound = guide.get_posterior().rsample_and_log_prob((NUM_DRAWS,))
        weights = target.log_prob(z) - bound
        masses = target.masses(z)
        again = target.masses(z[torch.multinomial(weights.softmax(0), NUM_DRAWS, replacement=True)])
    edges = np.linspace(-target.reach, target.reach, BINS + 1)
    counts = np.histogram2d(z[:, 0].numpy(), z[:, 1].numpy(), bins=[edges, edges])[0]
    shown = key["layers"] == 5 and key["flow"] in FLOW_NAMES  # by the picture
    return {
        "elbo": float(weights.mean()),
        "elbo_se": float(weights.std()) / math.sqrt(NUM_DRAWS),
        "least": float(masses.min()),
        "most": float(masses.max()),
        "least_resampled": float(again.min()),
        "most_resampled": float(again.max()),
        "within": float(masses.sum()),
        "params": count(guide),
        "steps_taken": len(result.losses),
        "restarts": result.num_restarts,
        **taken,
        "counts": packed(counts) if shown else None,
    }


def say(row: Row) -> str:
    return f"{', '.join(f'{name} {row[name]}' for name in KEY)}: {' | '.join(outcome([row]))}"


KEY = ("target", "layers", "base", "flow", "tempered", "seed")


def measure_speed(flow: str, rounds: int = 5) -> float:
    """Milliseconds a step of 1000 draws on the nine modes, in machine code: the median of rounds of 100."""
    pyro.clear_param_store()
    key: Row = {"target": "nine", "flow": flow, "base": "1", "layers": 5, "seed": 0}
    guide = matched_guide(key)
    program = partial(model, TARGETS["nine"])
    optim = pyro.optim.Adam({"lr": LR})
    svi = CompiledSVI(program, guide, optim, objective(False, STEPS), compile=True)
    svi.run(10, progress=False)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        svi.run(100, progress=False)
        times.append((time.perf_counter() - start) * 10.0)
    return float(np.median(times))


# -- report ------------------------------------------------------------------------------------------


def outcome(group: list[Row]) -> list[str]:
    """Cells of the rows of several seeds."""
    if any("error" in row for row in group):
        return [next(row["error"] for row in group if "error" in row)]
    each = " ".join(f"{row['elbo']:.3f}" for row in sorted(group, key=lambda row: row["seed"]))
    return [
        number(median([row["elbo"] for row in group]), 3),
        each,
        *(number(median([row[name] for row in group]), 3) for name in ("least", "most")),
        number(median([row["within"] for row in group]), 3),
        f"{group[0]['params']:,}",
        number(median([row["cpu_seconds"] for row in group]), 0),
    ]


def grouped(rows: list[Row], names: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def report(rows: list[Row]) -> None:
    """The seeds of every setting together, best ELBO 0."""
    head = ["target", "layers", "σ0", "flow", "tempered", "ELBO, median", "each seed", "lightest mode"]
    head += ["heaviest", "within 3 sd", "parameters", "CPU seconds"]
    lines = []
    order = [*TARGETS], [*BASES, "–"], [*FLOW_NAMES, *DEFAULT_NAMES]
    groups = grouped(rows, ("target", "layers", "base", "flow", "tempered"))
    for names in sorted(
        groups,
        key=lambda n: (order[0].index(n[0]), -n[1], order[1].index(n[2]), not n[4], order[2].index(n[3])),
    ):
        target, layers, base, flow, tempered = names
        said = "yes" if tempered else "no"
        lines.append([target, str(layers), base, flow, said, *outcome(groups[names])])
    print(markdown(head, lines))


def plot(rows: list[Row], path: Path, results: Path, target: str = "nine") -> None:
    """Densities of the middle seed of every fit, by base, tempering and flow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["target"] == target and row.get("counts")]
    groups = grouped(shown, ("base", "tempered", "flow"))
    kinds = [(base, tempered) for base in BASES for tempered in (False, True)]
    kinds = [kind for kind in kinds if (*kind, "cif") in groups]
    size = (2.1 * (1 + len(FLOW_NAMES)), 2.2 * len(kinds) + 0.5)
    figure, axes = plt.subplots(len(kinds), 1 + len(FLOW_NAMES), figsize=size, squeeze=False)
    reach = TARGETS[target].reach
    grid = torch.linspace(-reach, reach, BINS)
    truth = TARGETS[target].log_prob(torch.cartesian_prod(grid, grid)).exp().reshape(BINS, BINS).numpy()
    look: dict[str, Any] = {"cmap": "Blues", "extent": [-reach, reach] * 2, "origin": "lower"}
    for line, kind in zip(axes, kinds, strict=True):
        line[0].imshow(truth.T, **look)
        line[0].set_ylabel(f"$\\sigma_0$: {kind[0]}" + (", tempered" if kind[1] else ""))
        for axis, flow in zip(line[1:], FLOW_NAMES, strict=True):
            group = sorted(groups.get((*kind, flow), []), key=lambda row: row["elbo"])
            if group:
                row = group[len(group) // 2]
                axis.imshow(unpacked(row["counts"], BINS).T, **look)
                axis.set_xlabel(f"ELBO {row['elbo']:.3f}")
    for axis, title in zip(axes[0], ("target", *FLOW_NAMES), strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    save(figure, path, results, dpi=110)


def tasks(options: argparse.Namespace) -> list[Row]:
    """All that is to be fitted, seed by seed."""
    if options.chosen:
        names, size = ("target", "layers", "base", "tempered"), {"steps": 2000, "particles": 250}
        pairs = itertools.product(CHOSEN, FLOW_NAMES)
        settings = [dict(zip(names, one, strict=True)) | {"flow": flow} | size for one, flow in pairs]
        default = {"target": "nine", "layers": 5, "base": "–", "tempered": False, "steps": 3000}
        settings += [{"flow": flow, **default} for flow in DEFAULT_NAMES]
        return [{**each, "seed": s} for s in range(options.seeds) for each in settings]
    size = {"steps": options.steps, "particles": options.particles}
    return [
        {"target": t, "layers": n, "base": b, "flow": f, "tempered": w, "seed": s, **size}
        for s, t, n, w, b, f in itertools.product(
            range(options.seeds), options.targets, options.layers, (False, True), options.bases, FLOW_NAMES
        )
        if ("yes" if w else "no") in options.tempered
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["nine", "sixteen"], choices=TARGETS)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--layers", nargs="+", type=int, default=[5])
    parser.add_argument("--tempered", nargs="+", default=["no", "yes"], choices=("no", "yes"))
    parser.add_argument("--particles", type=int, default=PARTICLES)
    parser.add_argument("--chosen", action="store_true", help="the part that the page of results has")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", default="0/1", help="take every n-th task, for several processes")
    parser.add_argument("--output", type=Path, default=results_of("cif_mixture"))
    parser.add_argument("--speed", action="store_true", help="only measure milliseconds a step")
    parser.add_argument("--report", type=Path, help="print a table of this file and fit nothing")
    parser.add_argument("--figure", type=Path, help="with --report: a picture of the nine modes")
    options = parser.parse_args()
    if options.report is not None:
        rows = read(options.report)
        report(rows)
        if options.figure is not None:
            plot(rows, options.figure, options.report)
        return
    torch.set_num_threads(options.threads)
    if options.speed:
        for flow in FLOW_NAMES:
            print(f"{flow}: {measure_speed(flow):.1f} ms a step of {PARTICLES} draws", flush=True)
        return
    place, number_of = map(int, options.shard.split("/"))
    collect(tasks(options)[place::number_of], options.output, fit_one, say)


if __name__ == "__main__":
    main()
