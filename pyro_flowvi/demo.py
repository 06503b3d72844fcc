"""The demonstration: one model, four guides, a table and a picture."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from ._program.log_weights import LogWeights
from ._program.param_store import apart_from_store
from ._shapes import scalar_name
from ._text import aligned
from .autoguide import AutoPlanar, AutoRadial, AutoRealNVP
from .datasets import EIGHT_SCHOOLS, Reference, eight_schools_reference
from .diagnostics import Diagnosis, diagnose
from .diagnostics._printed import number_text
from .infer import fit
from .plotting import pair_panels

__all__ = ["GUIDES", "Row", "eight_schools", "run_demo", "table"]

GUIDES: Final[dict[str, Callable[..., Any]]] = {
    "AutoNormal (Pyro)": AutoNormal,
    "AutoPlanar": AutoPlanar,
    "AutoRadial": AutoRadial,
    "AutoRealNVP": AutoRealNVP,
}
"""The guides that the demo fits, by their names in its table."""
NUM_STEPS: Final = 4000
NUM_DRAWS: Final = 20_000


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """The centred eight-schools model (Rubin 1981): a funnel in ``tau`` and ``theta``.

    Example::

        >>> eight_schools(*(torch.tensor(EIGHT_SCHOOLS[key]) for key in ("y", "sigma")))
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


@dataclass(frozen=True)
class Row:
    """One guide's line of the table.

    :param name: of the guide.
    :param diagnosis: of its fit.
    :param error: worst ``|mean - reference mean|`` / reference sd; None without a reference.
    :param seconds: that the fit took.
    :param draws: name of a scalar -> draws, shape ``(S,)``.

    Example::

        >>> Row("guide", Diagnosis(0.0, 0.0, 0.0, 1.0, 0.0, 100, "good", ()), None, 1.0, {}).name
        'guide'
    """

    name: str
    diagnosis: Diagnosis
    error: float | None
    seconds: float
    draws: dict[str, NDArray[Any]]


def _scalars(draws: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Draws by scalar name: ``theta`` of shape (S, 2) becomes ``theta[0]`` and ``theta[1]``."""
    scalars = {}
    for name, value in draws.items():
        values = value.double().cpu().numpy()
        for index in np.ndindex(values.shape[1:]):
            scalars[scalar_name(name, index)] = values[(slice(None), *index)]
    return scalars


def _worst_error(draws: Mapping[str, NDArray[Any]], reference: Reference) -> float:
    means = np.array([draws[name].mean() for name in reference.names])
    return float(np.abs((means - reference.mean) / reference.sd).max())


def run_demo(
    model: Callable[..., Any] = eight_schools,
    data: Mapping[str, Any] | None = None,
    *,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    progress: bool = True,
) -> list[Row]:
    """Fits the model with every guide of :data:`pyro_flowvi.demo.GUIDES` and judges the fits.

    :param model: a Pyro model.
    :param data: its keyword arguments; those of the eight schools if None and the model is that one.
    :param num_steps: gradient steps for each guide.
    :param seed: of every fit.
    :param progress: shows progress bars in a terminal, and says on stderr which guide is being judged.

    Example::

        >>> rows = run_demo(num_steps=10, progress=False)
        >>> [row.name for row in rows]
        ['AutoNormal (Pyro)', 'AutoPlanar', 'AutoRadial', 'AutoRealNVP']
    """
    reference = None
    if model is eight_schools and data is None:
        data = {key: torch.tensor(value) for key, value in EIGHT_SCHOOLS.items()}
        reference = eight_schools_reference()
    kwargs = dict(data or {})
    rows = []
    for name, make in GUIDES.items():
        started = time.perf_counter()
        pyro.set_rng_seed(seed)
        guide = make(model)
        with apart_from_store():  # leaves the caller's parameters alone
            bars = progress and sys.stderr.isatty()
            result = fit(model, guide, num_steps=num_steps, model_kwargs=kwargs, seed=seed, progress=bars)
            seconds = time.perf_counter() - started
            if progress:
                print(f"judging {name}", file=sys.stderr, flush=True)
            diagnosis = diagnose(model, guide, model_kwargs=kwargs, seed=seed, fit_result=result)
            draws = _scalars(LogWeights(model, guide, (), kwargs).draws(NUM_DRAWS))
        error = None if reference is None else _worst_error(draws, reference)
        rows.append(Row(name, diagnosis, error, seconds, draws))
    return rows


def table(rows: list[Row]) -> str:
    """The figures of all rows as aligned text.

    Example::

        >>> good = Diagnosis(-3.2, 0.01, -3.1, 3500.0, 0.2, 4000, "good", ())
        >>> print(table([Row("AutoPlanar", good, 0.05, 3.0, {})]))
        guide       ELBO ± s.e. (nats)  PSIS k-hat  verdict  worst |mean error|/sd  seconds
        AutoPlanar        -3.20 ± 0.01        0.20     good                   0.05      3.0
    """
    header = ["guide", "ELBO ± s.e. (nats)", "PSIS k-hat", "verdict", "worst |mean error|/sd", "seconds"]
    lines = [header]
    for row in rows:
        d = row.diagnosis
        error = "-" if row.error is None else f"{row.error:.2f}"
        elbo = f"{d.elbo:.2f} ± {d.elbo_se:.2f}"
        lines.append([row.name, elbo, number_text(d.khat), d.verdict, error, f"{row.seconds:.1f}"])
    return aligned(lines)


def picture(rows: list[Row], reference: Reference | None = None) -> Any:
    """The Axes of all guides: the funnel of the eight schools, else the model's first two scalars."""
    names = list(rows[0].draws)
    if reference is not None:
        x, y = "theta[0]", "tau"
        behind = {name: reference.draws[:, i] for i, name in enumerate(reference.names)}
        return pair_panels(
            {row.name: (row.draws[x], np.log(row.draws[y])) for row in rows},
            ("theta[0], points", "log tau"),
            (behind[x], np.log(behind[y])),
            "NUTS",
        )
    x, y = names[0], names[min(1, len(names) - 1)]
    return pair_panels({row.name: (row.draws[x], row.draws[y]) for row in rows}, (x, y))
