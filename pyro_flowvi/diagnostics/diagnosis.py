"""diagnose: can this fit be trusted?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
from numpy.typing import NDArray

from .._checks import check_positive_int
from .._compile.log_density import traced
from .._program.call import as_keywords, check_programs
from .._program.devices import check_devices
from .._program.flat_directions import flat_sites
from ..autoguide import AutoFlow
from ..psis import effective_sample_size, generalized_pareto_shape, khat_threshold
from ._chains import ChainStates
from ._outputs import Outputs
from ._predictions import compare_outputs, judge_predictions
from ._printed import as_html, as_text
from ._verdict import SUPPORT, Figures, judge
from ._weighted_draws import WeightedDraws, weighted_draws
from ._weights import WeightFigures, read_weights
from .probes import Effort, Probes, probe

__all__ = ["Diagnosis", "diagnose"]

MIN_SAMPLES, FULL = 100, 4000
"""Draws at least, and those that are taken where fewer leave a verdict to chance."""
WEAK_SHARE, FEW_LATENTS = 0.5, 1000
"""Effective fraction of the draws below which that is so, and latents up to which more take no time."""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; prints as lines, and in a notebook as a table.

    :param elbo: evidence lower bound, nats.
    :param elbo_se: its Monte Carlo standard error.
    :param iw_elbo: importance-weighted bound over all draws.
    :param ess: effective sample size of the raw importance weights, between 1 and ``num_samples``.
    :param khat: Pareto shape of the importance weights.
    :param num_samples: number S of draws.
    :param verdict: "good", "usable" (after importance weighting) or "poor".
    :param reasons: why, in words.
    :param advice: what to try next, in words; empty if nothing is needed.
    :param shift: worst ``|mean of the draws - mean of the resampled draws|`` of a scalar latent, in sd
        of the resampled draws, in unconstrained coordinates; NaN where the draws have none.
    :param scale_shift: worst ``|log(sd of the resampled draws / sd of the draws)|`` of a scalar latent, as
        above.
    :param tail_index: heaviest tail of a scalar latent, a generalised Pareto shape: 1/nu of a Student t with
        nu degrees of freedom, about 0 of a normal.  Of the states of the probes' chains, else of the draws;
        NaN without either.
    :param predictive_shift: worst ``|mean of the draws - mean of the resampled draws|`` of an output, in sd
        of its predictions, with ``of``; NaN without.
    :param predictive_coverage: of the draws' 90 % intervals of the outputs, under the resampled draws, what
        is farthest from .9; NaN without ``of``.
    :param chains_shift: as ``predictive_shift``, of the draws against the probes' chains.
    :param chains_coverage: as ``predictive_coverage``, under the chains' states.
    :param num_nonfinite: draws whose density is not finite.
    :param probes: what the coverage probes saw; None where they make no sense, or were not wanted.
    :param log_weights: log p(x, z) - log q(z) of every draw, shape ``(S,)``; with ``num_groups`` those of the
        roots, log p(x, u) - log q(u), whose density is estimated without bias.
    :param log_evidence: log p(x), nats: log (1/S) sum_s w_s of the weights w_s = p(x, z_s) / q(z_s),
        smoothed (Vehtari et al. 2024, section 3) and zero of a draw without density; with ``num_groups`` of
        the roots', w_s = p(u_s) prod_g (1/K) sum_k p(x_g, z_gk | u_s) / q(z_gk | u_s) / q(u_s).
    :param log_evidence_se: its standard error, (sum_s v_s^2 - 1/S)^(1/2) with v_s = w_s / sum w; infinite
        where k-hat is above its threshold, and up to a third too small from 0.5 on.
    :param num_groups: how many groups of latents, independent given the roots, were integrated one by one;
        0 where the weights are those of all latents together.
    :param local_gap: nats that these groups together are from their posterior given the roots; NaN without.

    Example::

        >>> Diagnosis(-3.2, 0.01, -3.1, 3500.0, 0.2, 4000, "good", ("k-hat 0.20 is low",))
        good: ELBO -3.20 ± 0.01, IW-ELBO -3.10 (gap 0.10), ESS 3500 of 4000, k-hat 0.20
          - k-hat 0.20 is low
    """

    elbo: float
    elbo_se: float
    iw_elbo: float
    ess: float
    khat: float
    num_samples: int
    verdict: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...] = ()
    shift: float = math.nan
    scale_shift: float = math.nan
    tail_index: float = math.nan
    predictive_shift: float = math.nan
    predictive_coverage: float = math.nan
    chains_shift: float = math.nan
    chains_coverage: float = math.nan
    num_nonfinite: int = 0
    probes: Probes | None = field(default=None, repr=False)
    log_weights: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    num_groups: int = 0
    local_gap: float = math.nan

    @property
    def gap(self) -> float:
        """IW-ELBO less ELBO, nats: on average a lower bound on the divergence KL(q || p)."""
        return self.iw_elbo - self.elbo

    @property
    def khat_threshold(self) -> float:
        """The largest k-hat at which resampled draws can be relied on, by the number of draws."""
        return khat_threshold(self.num_samples)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For a notebook: the verdict, a table of the figures with a word on each, reasons and advice."""
        return as_html(self)


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    probes: bool = True,
    of: str | Sequence[str] | None = None,
    fit_result: Any = None,
    **kwargs: Any,
) -> Diagnosis:
    """Judges a fitted guide by its importance weights and by short chains around its draws.

    * "good", use the draws: k-hat at most 0.5 (or 95 % of the draws effective: by Cauchy-Schwarz no mean
      is then off by more than a quarter of an sd, nearly always far less), resampling moves no mean by
      0.08 sd and no sd by a factor of 1.08, the probes agree, and the training converged.
    * "usable", use resampled draws: k-hat at most min(1 - 1 / log10 S, 0.7) and an effective sample size of
      100, or half of the draws effective.  Also where the weights are useless and the probes find that the
      moments are sound all the same, as in hundreds of dimensions; the reasons say so.
    * "poor": all else, and where resampling changes an sd by more than 20 %, fewer than a tenth of the draws
      are effective or the training had not converged, unless chains (the last also: weights) confirm the fit.

    Discrete sites that the guide enumerates itself are summed out by its probabilities, which are not judged:
    such a fit is usable at best.  Those that it leaves to the model's enumeration are summed out exactly.

    Where a guide draws groups of latents that are independent of each other given the *roots*, the weights
    are those of the roots, log p(x, u) - log q(u), with p(x, u) estimated without bias from several draws of
    each group: they stay informative however many groups there are.

    The weights see the posterior only where the guide draws.  The *coverage probes* are 128 short chains of
    Hamiltonian Monte Carlo, half from draws of the guide, which must not drift from them, half from far
    around, which cool down to the posterior and show modes that the guide misses; a mode counts by its mass.
    They run over the noise of the guide's map where it has one (of more than 150 latents 64 or 32 chains),
    else over the latents, where a funnel keeps them from settling: such a fit is usable at best.
    One that is a mirror image under an exact symmetry of the density, such as exchanged labels, is called so.
    No finite run can exclude a mode that is farther or narrower than any start of a chain.

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param args: the model's positional arguments.
    :param num_samples: number S of draws, at least 100.  Where fewer than half of them are effective 4,000
        are taken; of the roots of very many latents fewer.
    :param kwargs: the model's keyword arguments.
    :param model_kwargs: those whose names are options of this function.
    :param seed: sets Pyro's seed first.
    :param probes: whether to run the chains, at most 36,000 gradients of the log density in 280 batches;
        a tenth of that where the model does not run for many points at once.
    :param of: what is judged: None for the latents; "predictions" for the observed sites; or names of
        observed and ``pyro.deterministic`` sites.  For networks and other models whose parameters are not
        identified: their latents have many modes with the same predictions.  "Good" then are predictive means
        within .1 predictive sd and 90 % intervals within 3 points of coverage, by the weights where these are
        informative and by the chains, those from far starts as far as they settled; "usable" is what
        resampling mends.  At most 1,000 outputs are compared.
    :param fit_result: what :func:`pyro_flowvi.fit` returned: a fit that had not converged is never good.
    :raises ValueError: if an argument is not of the described kind, ``num_samples`` is too small, the outputs
        that ``of`` names are none of the model's or change with the rows that a run shows, the guide has not
        been set up and cannot be, model and guide are swapped, the data are no tensors or on another device
        than the guide, or Pyro's validation refuses the shape of a site.
    :raises TypeError: for a keyword that is neither an option nor an argument of the model.

    References: Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto Smoothed Importance Sampling*, 2024
    (k-hat and its threshold, section 3.2.4); Yao, Vehtari, Simpson and Gelman, *Yes, but Did It
    Work?: Evaluating Variational Inference*, 2018; Burda, Grosse and Salakhutdinov, *Importance Weighted
    Autoencoders*, 2016 (equation 8, the IW-ELBO).

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO(20))
        >>> losses = [svi.step() for _ in range(300)]
        >>> diagnose(model, guide, seed=0).verdict
        'good'
    """
    if check_positive_int("num_samples", num_samples) < MIN_SAMPLES:
        raise ValueError(f"num_samples: expected at least {MIN_SAMPLES}, got {num_samples}")
    if not isinstance(probes, bool):
        raise ValueError(f"probes: expected True or False, got {probes!r}")
    check_programs(model, guide)
    kwargs = as_keywords(diagnose, model, kwargs, model_kwargs)
    check_devices(model, guide, args, kwargs)
    if seed is not None:
        pyro.set_rng_seed(seed)
    draws = weighted_draws(model, guide, args, kwargs, num_samples)
    if num_samples < FULL and _are_weak(draws):
        draws = weighted_draws(model, guide, args, kwargs, FULL)
    outputs = None if of is None else Outputs(draws, of)
    log_weights, num_samples = draws.log_weights, len(draws.log_weights)
    finite = np.isfinite(log_weights)
    dropped = int(num_samples - finite.sum())
    if finite.sum() < MIN_SAMPLES:
        reason = f"{dropped} of {num_samples} draws have a density that is not finite"
        return Diagnosis(
            -math.inf, math.nan, math.nan, 1.0, math.inf, num_samples, "poor", (reason,), (SUPPORT,),
            num_nonfinite=dropped, log_weights=log_weights,
        )  # fmt: skip
    found = read_weights(draws)
    fixed = draws.particles.point_masses()
    skipped = _why_no_probes(draws, fixed)
    names, moved, seen, tail_index = draws.names() or [""], found.moved, None, math.nan
    inner = draws.grouped or draws.by_row
    chains, predictions = list[ChainStates](), None
    if found.z is not None:
        z = found.z.double().cpu().numpy()
        tail_index = max(generalized_pareto_shape(np.abs(x - np.median(x))) for x in z.T)
        if probes and not skipped:
            seen = _run_probes(draws, found, names, chains.append)
        if outputs is not None:
            predictions = compare_outputs(outputs, found, *chains)
    figures = Figures(
        khat=found.khat,
        khat_threshold=khat_threshold(num_samples),
        ess=found.ess,
        elbo_se=found.elbo_se,
        num_samples=num_samples,
        num_nonfinite=dropped,
        dim=len(names),
        shift=moved.location,
        scale_shift=moved.scale,
        shift_name=names[moved.place],
        shift_kind=_kind(draws, moved.place),
        scale_name=names[moved.scale_place],
        scale_noise=moved.scale_noise,
        guide_tail_index=tail_index,
        probes=seen,
        converged=getattr(fit_result, "converged", None),
        guide=type(guide).__name__,
        resamples=isinstance(guide, AutoFlow),
        has_tails=getattr(guide, "_tails", False) is True,
        has_rows=getattr(guide, "_rows", None) is not None,
        num_groups=draws.num_groups,
        num_each=0 if inner is None else inner.num_each,
        local_gap=math.nan if inner is None else inner.local_gap,
    )
    judgement = judge(figures) if predictions is None else judge_predictions(figures, predictions)
    if fixed:
        judgement.add(
            f"the guide is a point mass at {fixed}: it has no density there to weigh by",
            0,
            "take a guide with a density there, AutoRealNVP",
        )
    if summed := sorted(draws.particles.structure.summed_by_guide):
        judgement.add(
            f"the guide sums out the sites {summed} by its own probabilities, which the weights do not judge",
            1,
            f"leave the sites {summed} out of the guide: the model's enumeration of them is exact",
        )
    flat = [] if draws.density is None else flat_sites(draws.density)
    if flat:
        judgement.add(
            f"the posterior is improper: it is flat along a direction of the sites {flat}",
            0,
            f"give the sites {flat} proper priors, such as wide normals",
        )
    if draws.particles.structure.subsampled and not draws.exact:
        judgement.add("the model subsamples its data: the weights contain that noise as well")
    if draws.particles.structure.indexed:
        judgement.add("weights, k-hat and ELBO are those of the extended space of latents and indices")
    if probes and skipped:
        judgement.add(f"no coverage probes: {skipped}")
    return Diagnosis(
        elbo=found.elbo,
        elbo_se=found.elbo_se,
        iw_elbo=found.iw_elbo,
        ess=found.ess,
        khat=found.khat,
        num_samples=num_samples,
        verdict=judgement.verdict,
        reasons=tuple(judgement.reasons),
        advice=judgement.told,
        shift=moved.location,
        scale_shift=moved.scale,
        tail_index=tail_index if seen is None or math.isnan(seen.tail_index) else seen.tail_index,
        num_nonfinite=dropped,
        probes=seen,
        **({} if predictions is None else predictions.figures()),
        log_weights=log_weights,
        log_evidence=found.log_evidence,
        log_evidence_se=found.log_evidence_se,
        num_groups=figures.num_groups,
        local_gap=figures.local_gap,
    )


def _kind(draws: WeightedDraws, place: int) -> str:
    """Whether a coordinate is one of the roots or of a group, in words; empty without groups."""
    if draws.roots is None:
        return ""
    return ", a root," if bool((draws.roots == place).any()) else ", of a group given the roots,"


def _are_weak(draws: WeightedDraws) -> bool:
    """Whether weights are so uneven that a verdict would depend on the few draws that carry them."""
    finite = draws.log_weights[np.isfinite(draws.log_weights)]
    if draws.density is None or draws.density.dim > FEW_LATENTS or not traced(draws.density).batched:
        return False
    return not len(finite) or effective_sample_size(finite) < WEAK_SHARE * len(finite)


def _run_probes(
    draws: WeightedDraws, found: WeightFigures, names: list[str], watch: Callable[[ChainStates], None]
) -> Probes:
    """The chains, over the noise of the guide's map if it has one."""
    assert draws.density is not None
    assert found.z is not None
    effort = Effort.of(found.z.shape[-1], traced(draws.density).batched, draws.flow is not None)
    density = traced(draws.density, effort.num_chains)
    return probe(
        density, found.z, found.log_weights, found.weights, names, effort, draws.flow, found.corrected,
        draws.roots, draws.density.packing, watch,
    )  # fmt: skip


def _why_no_probes(draws: WeightedDraws, fixed: list[str]) -> str:
    """Why chains make no sense for this pair, in words; empty if they do."""
    if draws.density is None:
        return draws.why
    if fixed:
        return "a point mass has no spread to start chains with"
    if draws.particles.structure.subsampled:
        return "the density is another one at each call, since the model subsamples its data"
    return ""
