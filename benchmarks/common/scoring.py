"""What the benchmarks of whole fits share: guides to train, and scores of draws.

Two sets of draws are compared by the worst scalar: the difference of the means in standard deviations of the
reference, and the ratio of the standard deviations.  A fit is *right* where every mean is within 0.1 standard
deviations and every ratio within 0.9 to 1.1.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.distributions.transforms import iterated, planar
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor

import pyro_flowvi
from benchmarks.common.results import Row
from pyro_flowvi._program.start_trace import SafeInit

Array = NDArray[np.float64]
Model = Callable[..., Any]

OURS = (
    "AutoPlanar",
    "AutoRadial",
    "AutoNICE",
    "AutoRealNVP",
    "AutoNeuralSpline",
    "AutoIAF",
    "AutoSylvester",
)
PARTICLES, LEARNING_RATE, FINAL_RATE = 16, 1e-2, 1e-3
PLANAR_LAYERS = 8
MEAN_BOUND, RATIO_BOUNDS = 0.1, (0.9, 1.1)
DIRECTIONS = 128

# The two guides that ignore ``init_loc_fn`` are given a model that has start values instead: as they are,
# they stop at a flat prior, which has no sampler.
_START = InitMessenger(SafeInit(init_to_median))
STOCK: dict[str, Callable[[Model], Any]] = {
    "pyro.AutoNormal": partial(autoguide.AutoNormal, init_loc_fn=SafeInit(init_to_median)),
    "pyro.AutoMultivariateNormal": partial(
        autoguide.AutoMultivariateNormal, init_loc_fn=SafeInit(init_to_median)
    ),
    "pyro.AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(_START(model)),
    "pyro.AutoNormalizingFlow": lambda model: autoguide.AutoNormalizingFlow(
        _START(model), partial(iterated, PLANAR_LAYERS, planar)
    ),
}


def train_stock(name: str, model: Model, args: tuple[Any, ...], steps: int, seed: int) -> Any:
    """A guide of Pyro's, trained by Pyro's eager SVI at the setting that all peers have."""
    pyro.set_rng_seed(seed)
    guide = STOCK[name](model)
    decay = (FINAL_RATE / LEARNING_RATE) ** (1.0 / steps)
    optim = pyro.optim.ClippedAdam({"lr": LEARNING_RATE, "lrd": decay})
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, optim, loss)
    for _ in range(steps):
        svi.step(*args)
    return guide


def train_ours(name: str, model: Model, args: tuple[Any, ...], seed: int, **options: Any) -> tuple[Any, Any]:
    """A guide of this package at its defaults, and what ``fit`` returned."""
    guide = getattr(pyro_flowvi, name)(model)
    return guide, pyro_flowvi.fit(model, guide, *args, seed=seed, progress=False, **options)


@torch.no_grad()
def draw(guide: Any, args: tuple[Any, ...], num_draws: int) -> dict[str, Tensor]:
    """Draws of every site, each ``(num_draws, ...)``, of a guide whose model has no plates."""
    if hasattr(guide, "sample_posterior"):
        drawn: dict[str, Tensor] = guide.sample_posterior(num_draws)
        return drawn
    with pyro.plate("draws", num_draws, dim=-1):
        return {name: value.detach() for name, value in guide(*args).items()}


@torch.no_grad()
def redraw(guide: Any, num_draws: int) -> dict[str, Tensor] | None:
    """Draws resampled by Pareto-smoothed weights; None for a guide that does not offer them."""
    sample = getattr(guide, "sample_posterior", None)
    if sample is None or "resample" not in inspect.signature(sample).parameters:
        return None
    drawn: dict[str, Tensor] = sample(num_draws, resample=True)
    return drawn


def scalars(sites: Mapping[str, Tensor]) -> dict[str, Array]:
    """Each scalar of each site by name, ``(n,)``."""
    result = {}
    for name, value in sites.items():
        parts = value.detach().double().cpu().numpy().reshape(len(value), -1).T
        result |= {f"{name}[{i}]" if len(parts) > 1 else name: part for i, part in enumerate(parts, 1)}
    return result


def width(draws: Array) -> float:
    """From the 5 % to the 95 % quantile: a scale that heavy tails do not move."""
    low, high = np.quantile(draws, [0.05, 0.95])
    return float(high - low)


def accuracy(draws: Mapping[str, Array], reference: Mapping[str, Array], prefix: str = "") -> Row:
    """The scores by the worst scalar, and which it is; None where a draw is not finite.

    ``sd_low`` and ``sd_high`` are the smallest and largest ratios of standard deviations, ``width_low`` and
    ``width_high`` those of :func:`width`.
    """
    if not all(np.isfinite(draws[name]).all() for name in reference):
        keys = ("worst_mean", "worst_name", "sd_low", "sd_high", "width_low", "width_high")
        return dict.fromkeys((prefix + key for key in keys), None)
    means = {n: abs(float(draws[n].mean() - r.mean()) / r.std()) for n, r in reference.items()}
    sds = [float(draws[n].std() / r.std()) for n, r in reference.items()]
    widths = [width(draws[n]) / width(r) for n, r in reference.items()]
    worst = max(means, key=lambda name: means[name])
    values: Row = {"worst_mean": means[worst], "worst_name": worst, "sd_low": min(sds), "sd_high": max(sds)}
    values |= {"width_low": min(widths), "width_high": max(widths)}
    return {prefix + key: value for key, value in values.items()}


def is_right(row: Row, prefix: str = "", scale: str = "sd") -> bool:
    """Whether the draws of a result are right, by the ratio of ``scale``, "sd" or "width"."""
    mean = row.get(f"{prefix}worst_mean")
    if mean is None:
        return False
    low, high = row[f"{prefix}{scale}_low"], row[f"{prefix}{scale}_high"]
    return bool(mean < MEAN_BOUND and low >= RATIO_BOUNDS[0] and high <= RATIO_BOUNDS[1])


def worst_ratio(row: Row, prefix: str = "", scale: str = "sd") -> float:
    """The ratio that is furthest from 1, on the log scale; infinite where there is none."""
    if row.get(f"{prefix}worst_mean") is None:
        return math.inf
    ratios = row[f"{prefix}{scale}_low"], row[f"{prefix}{scale}_high"]
    return float(max(ratios, key=lambda ratio: abs(math.log(max(ratio, 1e-300)))))


def worst_ratio_of(rows: Iterable[Row], prefix: str = "") -> float:
    """That of several results; NaN of none."""
    ratios = (worst_ratio(row, prefix) for row in rows)
    return max(ratios, key=lambda ratio: abs(math.log(max(ratio, 1e-300))), default=math.nan)


class SlicedDistance:
    """Wasserstein-2 distances along fixed random directions, over what the reference's own noise gives.

    Half of the reference is what draws are compared with, in coordinates that it standardises; its distance
    to the other half is the unit, so that about 1 is the best that can be seen.

    :param reference: unconstrained draws, shape ``(n, D)``.
    """

    def __init__(self, reference: Tensor) -> None:
        reference = reference.detach().double()
        self.loc, self.scale = reference.mean(0), reference.std(0)
        directions = np.random.default_rng(0).standard_normal((reference.shape[-1], DIRECTIONS))
        self.directions = torch.from_numpy(directions / np.linalg.norm(directions, axis=0))
        self.half = self._project(reference[::2])
        self.floor = self._distance(self._project(reference[1::2]))

    def _project(self, z: Tensor) -> Tensor:
        return (((z.double() - self.loc) / self.scale) @ self.directions).sort(0).values

    def _distance(self, projected: Tensor) -> float:
        return float((projected - self.half).square().mean().sqrt())

    def __call__(self, z: Tensor) -> float | None:
        """Of at least half as many draws as the reference has; None where one is not finite."""
        value = self._distance(self._project(z.detach()[: len(self.half)])) / self.floor
        return value if math.isfinite(value) else None


def judge(model: Model, guide: Any, args: tuple[Any, ...], seed: int) -> Row:
    """ELBO, k-hat and verdict of ``pyro_flowvi.diagnose``."""
    started = time.perf_counter()
    found = pyro_flowvi.diagnose(model, guide, *args, seed=seed)
    return {
        "elbo": found.elbo,
        "elbo_se": found.elbo_se,
        "khat": found.khat,
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "diagnose_seconds": time.perf_counter() - started,
    }
