"""diagnose: can this fit be trusted?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch

from ._checks import check_positive_int
from .autoguide import AutoFlow
from .infer.particles import Particles
from .psis import effective_sample_size, psis

__all__ = ["Diagnosis", "diagnose"]

MIN_SAMPLES = 100
GOOD_SHARE = 0.8
"""Least effective fraction of the draws for "good" (a divergence of about a tenth of a nat)."""
USABLE_SHARE = 0.5
"""Least effective fraction of the draws for "usable" where k-hat is above its bound."""
SURE_SHARE = 0.95
"""From this fraction on, a heavy tail of the weights is too rare to matter."""
USABLE_ESS = 100.0
"""Least effective sample size for "usable"."""
LARGE_SE = 0.1
"""Standard error of the ELBO, nats, above which it is a reason of its own."""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    :param elbo: evidence lower bound, nats.
    :param elbo_se: its Monte Carlo standard error.
    :param iw_elbo: importance-weighted bound over all draws; ``iw_elbo - elbo`` estimates a lower bound
        of the divergence KL(q || p).
    :param ess: effective sample size of the raw importance weights, between 1 and ``num_samples``.
    :param khat: Pareto shape of the importance weights.
    :param num_samples: number of draws.
    :param verdict: "good", "usable" (after importance weighting) or "poor".
    :param reasons: why, in words.

    Example::

        >>> Diagnosis(-3.2, 0.01, -3.1, 3500.0, 0.2, 4000, "good", ("k-hat 0.20 is low",))
        Diagnosis(good: ELBO -3.20 ± 0.01, IW-ELBO -3.10, ESS 3500 of 4000, k-hat 0.20; k-hat 0.20 is low)
    """

    elbo: float
    elbo_se: float
    iw_elbo: float
    ess: float
    khat: float
    num_samples: int
    verdict: str
    reasons: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"Diagnosis({self.verdict}: ELBO {self.elbo:.2f} ± {self.elbo_se:.2f}, IW-ELBO "
            f"{self.iw_elbo:.2f}, ESS {self.ess:.0f} of {self.num_samples}, k-hat {self.khat:.2f}; "
            f"{'; '.join(self.reasons)})"
        )


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Diagnosis:
    """Judges a fitted guide by the importance weights of its own draws.

    With the bound min(1 - 1 / log10 S, 0.7) on k-hat (Vehtari et al. 2024):

    * "good": k-hat within it and 80 % of the draws effective, or 95 % of the draws effective (by
      Cauchy-Schwarz no mean is then off by more than a quarter of a standard deviation, nearly always far
      less).
    * "usable", that is after importance weighting: k-hat within it and an effective sample size of 100, or
      half of the draws effective.
    * "poor": all else.

    Draws of the guide cannot show a mode that it misses.

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param args: the model's positional arguments.
    :param num_samples: number S of draws, at least 100.
    :param model_kwargs: the model's keyword arguments.
    :param seed: sets Pyro's seed first.
    :raises ValueError: if ``num_samples`` is too small, or the guide has not been set up and cannot be.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> _ = pyro_flowvi.fit(model, guide, num_steps=500, lr=0.05, seed=0, progress=False)
        >>> diagnose(model, guide, seed=0).verdict
        'good'
    """
    if check_positive_int("num_samples", num_samples) < MIN_SAMPLES:
        raise ValueError(f"num_samples: expected at least {MIN_SAMPLES}, got {num_samples}")
    if seed is not None:
        pyro.set_rng_seed(seed)
    if isinstance(guide, AutoFlow):
        guide.materialize(*args, **(model_kwargs or {}))
    particles = Particles(model, guide, args, model_kwargs)
    fixed = particles.point_masses()
    log_weights = particles.log_weights(num_samples).double().cpu().numpy()
    finite = log_weights[np.isfinite(log_weights)]
    dropped = num_samples - len(finite)
    if len(finite) < MIN_SAMPLES:
        reason = f"{dropped} of {num_samples} draws have a density that is not finite"
        return Diagnosis(-math.inf, math.nan, math.nan, 1.0, math.inf, num_samples, "poor", (reason,))
    _, khat = psis(finite)
    ess = effective_sample_size(finite)
    elbo, elbo_se = float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(len(finite)))
    if dropped:
        elbo, elbo_se = -math.inf, math.nan
    iw_elbo = float(torch.logsumexp(torch.from_numpy(finite), 0)) - math.log(num_samples)
    verdict, reasons = _judge(khat, ess, elbo_se, num_samples, dropped)
    if fixed:
        verdict = "poor"
        reasons.append(f"the guide is a point mass at {fixed}: it has no density there to weigh by")
    if particles.subsampled:
        reasons.append("the model subsamples its data: the weights contain that noise as well")
    return Diagnosis(elbo, elbo_se, iw_elbo, ess, khat, num_samples, verdict, tuple(reasons))


def _judge(khat: float, ess: float, elbo_se: float, num_samples: int, dropped: int) -> tuple[str, list[str]]:
    threshold = min(1.0 - 1.0 / math.log10(num_samples), 0.7)
    share = ess / num_samples
    within = khat <= threshold
    if (within and share >= GOOD_SHARE) or share >= SURE_SHARE:
        verdict = "good"
    else:
        verdict = "usable" if (within and ess >= USABLE_ESS) or share >= USABLE_SHARE else "poor"
    reasons = [f"k-hat {khat:.3f} is {'within' if within else 'above'} {threshold:.3f}"]
    if not within:
        rare = ", which matters little here" if verdict == "good" else ""
        reasons[0] += f": rare draws carry much weight, the guide's tails are too light{rare}"
    reasons.append(f"{100 * share:.1f} % of the draws are effective")
    if elbo_se > LARGE_SE:
        reasons.append(f"the ELBO itself is uncertain, ± {elbo_se:.2f}")
    if dropped:
        verdict = "poor"
        reasons.append(f"{dropped} of {num_samples} draws have a density that is not finite")
    return verdict, reasons
