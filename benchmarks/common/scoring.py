"""What the benchmarks of whole fits share: guides to train, scores of draws, a file of results.

Two sets of draws are compared by the worst scalar: the difference of the means in standard deviations of the
reference, and the ratio of the standard deviations.  A fit is *right* where every mean is within 0.1 standard
deviations and every ratio within 0.9 to 1.1.

Results are lines of JSON, written as they come; what a file has already is not run again.
"""

import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.distributions.transforms import iterated, planar
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from tqdm import tqdm

import pyro_flowvi
from pyro_flowvi._program.start_trace import SafeInit

Array = NDArray[np.float64]
Row = dict[str, Any]
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


# -- results -------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def finite(row: Row) -> Row:
    """JSON has no infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def isolated(key: Row, timeout: float, cold: bool) -> Row:
    """The result of the same script in a process of its own, which gets the task as ``--one``.

    With ``cold`` the compiler's cache is empty, and a second process measures what is left with a full one.
    """
    module: Any = sys.modules["__main__"].__spec__  # there is one under ``python -m``
    command = [sys.executable, "-m", module.name, *sys.argv[1:], "--one", json.dumps(key)]

    def child(**variables: str) -> Row:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **variables}
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {timeout:.0f} s"}
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        result: Row = json.loads(done.stdout.splitlines()[-1])
        return result

    if not cold:
        return child()
    with tempfile.TemporaryDirectory() as cache:
        first = child(TORCHINDUCTOR_CACHE_DIR=cache)
        second = child(TORCHINDUCTOR_CACHE_DIR=cache)
    return {**second, "seconds_cold": first.get("seconds")}


def attempt(key: Row, run: Callable[[Row], Row]) -> Row:
    """The result of a task in this process, an error included."""
    warnings.simplefilter("ignore")
    pyro.clear_param_store()
    try:
        return run(key)
    except Exception as error:
        return {"error": first_line(error)}


def collect(
    keys: Iterable[Row],
    output: Path,
    run: Callable[[Row], Row],
    say: Callable[[Row], str],
    *,
    apart: bool = False,
    cold: Callable[[Row], bool] = lambda key: False,
    timeout: float = 1800.0,
) -> None:
    """Runs the tasks that the file does not have, one after another, and adds their results to it.

    :param keys: the tasks; a result has the entries of its task.
    :param run: the result of a task.
    :param say: what to print of a result.
    :param apart: each task in a process of its own.
    :param cold: of which tasks to measure a run with an empty cache of the compiler, in its own process.
    :param timeout: seconds for a task in its own process.
    """
    done = read(output)
    missing = [
        key
        for key in keys
        if not any(all(row.get(name) == value for name, value in key.items()) for row in done)
    ]
    for key in tqdm(missing, unit="run", disable=None):  # none where the output is not a terminal
        alone = apart or cold(key)
        found = isolated(key, timeout, cold(key)) if alone else attempt(key, run)
        row = finite({**key, **found, "isolated": alone})
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(say(row))
        sys.stdout.flush()


def chosen(starts: list[str], names: tuple[str, ...]) -> list[str]:
    """The names that begin with one of the starts, in their own order; all without any."""
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise SystemExit(f"expected the start of one of {', '.join(names)}, got {start!r}")
    return [name for name in names if not starts or any(name.startswith(start) for start in starts)]


def median(values: Sequence[float | None]) -> float:
    """A missing value is a failure, and counts as infinite."""
    return float(np.median([math.inf if value is None else value for value in values]))


def number(value: float | None, digits: int = 2) -> str:
    """As short as a table wants it."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.{max(0, digits - 1)}f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])
