"""Twenty kinds of hierarchical models as users write them, each with its data.

    problem = KINDS["growth curves"].problem("broadcasting")
    guide = AutoRealNVP(problem.model)
    fit(problem.model, guide, *problem.args)
    errors(problem.coordinates(guide.sample_posterior(10_000)), truth)  # of structured_truths.py

The programs are in the language that Pyro and NumPyro share: ``p`` and ``dist`` are of either, ``xp`` is
torch or jax.numpy.  Where rows know their groups by an index, a program has two *forms*, by ``at``: with
``()`` it reads ``a[group]``, which does not broadcast over particles, with ``(...,)`` ``a[..., group]``,
which does.  A kind without an index has the latter alone.

The data are drawn from fixed seeds, and are about as large as those that such models are taught with; the
radon's are posteriordb's, from the folder that the environment variable PYRO_FLOWVI_POSTERIORDB names.  All
is float64: set torch's default dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.common import hierarchical_counts as counts
from benchmarks.common import hierarchical_normal as normal
from benchmarks.common import hierarchies, structured_models
from benchmarks.common.structured_problem import NUM_LOCALS, Problem, Sites, some

FORMS: dict[str, tuple[Any, ...]] = {"plain": (), "broadcasting": (...,)}


@dataclass(frozen=True)
class Kind:
    """A hierarchical model and its data.

    :param program: from ``p``, ``dist``, ``xp``, ``at`` and the data.
    :param roots: as of :class:`Problem`, as are ``locals``.
    :param indexed: whether there are two forms.
    :param noncentred: the sites that NUTS has as standard normal noise.
    :param acceptance: NUTS's target.
    :param dense: whether NUTS's mass matrix is.
    :param exact: what gives independent draws of the posterior, in NUTS's place.
    """

    program: Callable[..., None]
    data: Callable[[], tuple[Tensor, ...]]
    roots: Mapping[str, str]
    locals: Callable[[Sites], dict[str, Tensor]]
    indexed: bool = True
    noncentred: tuple[str, ...] = ()
    acceptance: float = 0.9
    dense: bool = False
    exact: Callable[[], hierarchies.Hierarchy] | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(FORMS) if self.indexed else ("broadcasting",)

    def problem(self, form: str) -> Problem:
        model = partial(self.program, pyro, dist, torch, FORMS[form])
        return Problem("", model, self.data(), self.roots, self.locals)


def logs(*names: str) -> Callable[[Sites], dict[str, Tensor]]:
    """Of positive locals, their logarithms."""
    return lambda sites: {f"log {name}": sites[name].log() for name in names}


KINDS: dict[str, Kind] = {
    "eight schools": Kind(
        normal.eight_schools,
        lambda: structured_models.eight_schools().args,
        {"mu": "", "tau": "log"},
        some("theta"),
        indexed=False,
        noncentred=("theta",),
        acceptance=0.98,
    ),
    "radon intercepts": Kind(
        normal.radon_intercepts,
        normal.radon_data,
        {"mu": "", "beta": "", "tau": "log", "sigma": "log"},
        some("a"),
        exact=lambda: hierarchies.radon_of(hierarchies.plain, *normal.radon_data()),
    ),
    "radon slopes": Kind(
        normal.radon_slopes,
        normal.radon_data,
        {"m": "", "t": "log", "C": "artanh", "sigma": "log"},
        some("ab"),
        noncentred=("ab",),
    ),
    "growth curves": Kind(
        normal.growth_curves,
        normal.growth_data,
        {"m": "", "t": "log", "C": "artanh", "sigma": "log"},
        some("ab"),
    ),
    "three levels": Kind(
        normal.three_levels,
        normal.three_levels_data,
        {"mu": "", "beta": "", "ts": "log", "tc": "log", "sigma": "log"},
        some("s", "c"),
    ),
    "raters": Kind(
        normal.raters,
        normal.raters_data,
        {"mu": "", "tr": "log", "te": "log", "sigma": "log"},
        some("r", "e"),
        noncentred=("r",),
        dense=True,
    ),
    "meta-analysis": Kind(
        normal.meta_analysis,
        normal.meta_data,
        {"alpha": "", "beta": "", "tau": "log"},
        some("theta"),
        noncentred=("theta",),
        acceptance=0.95,
    ),
    "Student-t groups": Kind(
        normal.student_groups,
        normal.student_data,
        {"mu": "", "tau": "log", "sigma": "log", "nu": "log"},
        some("a"),
        noncentred=("a",),
    ),
    "unequal spreads": Kind(
        normal.unequal_spreads,
        normal.spreads_data,
        {"mu": "", "tau": "log", "ms": "", "ts": "log"},
        lambda sites: some("a")(sites) | logs("s")(sites),
    ),
    "autoregressions": Kind(
        normal.autoregressions,
        normal.autoregressions_data,
        {"mc": "", "tc": "log", "mr": "", "tr": "log", "sigma": "log"},
        some("c", "r"),
        noncentred=("c", "r"),
    ),
    "local level": Kind(
        normal.local_level,
        lambda: hierarchies.made_up_walk().args,
        structured_models.WALK,
        partial(structured_models.stacked, "x", hierarchies.NUM_STEPS),
        indexed=False,
        exact=hierarchies.made_up_walk,
    ),
    "horseshoe": Kind(
        normal.horseshoe,
        normal.horseshoe_data,
        {"tau": "log", "sigma": "log"},
        lambda sites: {"w": sites["w"][:, :NUM_LOCALS], "log lam": sites["lam"][:, :NUM_LOCALS].log()},
        noncentred=("w",),
        acceptance=0.995,
    ),
    "Poisson rates": Kind(counts.poisson_rates, counts.poisson_data, {"mu": "", "tau": "log"}, logs("rate")),
    "negative binomial": Kind(
        counts.negative_binomial,
        counts.negative_binomial_data,
        {"mu": "", "beta": "", "tau": "log", "phi": "log"},
        some("a"),
        noncentred=("a",),
    ),
    "baseball": Kind(
        counts.baseball,
        counts.baseball_data,
        {"m": "logit", "log_kappa": ""},
        lambda sites: {"logit share": sites["share"].logit()},
        indexed=False,
        acceptance=0.98,
    ),
    "hospitals": Kind(
        counts.hospitals,
        counts.hospitals_data,
        {"mu": "", "beta": "", "tau": "log"},
        some("a"),
        noncentred=("a",),
        acceptance=0.95,
    ),
    "missing answers": Kind(
        counts.missing_answers,
        counts.missing_data,
        {"mu": "", "beta": "", "tau": "log"},
        some("a"),
        noncentred=("a",),
    ),
    "IRT 2PL": Kind(
        counts.irt,
        counts.irt_data,
        {"mb": "", "sb": "log"},
        lambda sites: some("b", "theta")(sites) | logs("a")(sites),
    ),
    "poll": Kind(
        counts.poll,
        counts.poll_data,
        {"mu": "", "beta": "", **{f"t_{name}": "log" for name in counts.LEVELS_OF_POLL}},
        some(*(f"a_{name}" for name in counts.LEVELS_OF_POLL)),
        noncentred=tuple(f"a_{name}" for name in counts.LEVELS_OF_POLL),
        acceptance=0.98,
    ),
    "frailty": Kind(counts.frailty, counts.frailty_data, {"b0": "", "b1": "", "k": "log"}, logs("u")),
}
