"""Location and scale of a site's prior in its unconstrained coordinates."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import ExpTransform, Independent

from .._types import Program
from .packing import Latent, Packing

__all__ = ["NormalPrior", "normal_prior", "read_priors"]

MAX_JOINT = 32
"""Numbers of a multivariate normal above which its factor costs more than it helps."""
EULER = 0.5772156649015329


class NormalPrior(NamedTuple):
    """A normal prior, or one that a normal with the same mean and standard deviation stands for."""

    loc: Tensor
    """Of the site's unconstrained shape."""
    scale: Tensor
    """Of the same shape; of a joint prior of K numbers with one more dimension, a lower factor."""
    joint: bool
    """Whether the numbers of the last dimension depend on each other."""


def _peeled(fn: Any) -> Any:
    while isinstance(fn, Independent | ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _normal(fn: Any) -> tuple[Tensor, Tensor]:
    return fn.loc, fn.scale


def _log_gamma(concentration: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the logarithm of a Gamma."""
    return torch.digamma(concentration) - log_rate, torch.polygamma(1, concentration).sqrt()


def _half_normal(fn: Any) -> tuple[Tensor, Tensor]:
    # log |N(0, 1)| has mean -(γ + log 2) / 2 and variance π² / 8.
    return fn.scale.log() - 0.5 * (EULER + math.log(2.0)), _filled(fn.scale, math.pi / math.sqrt(8.0))


def _inverse_gamma(fn: Any) -> tuple[Tensor, Tensor]:
    base = fn.base_dist
    mean, scale = _log_gamma(base.concentration, base.rate.log())
    return -mean, scale


def _beta(fn: Any) -> tuple[Tensor, Tensor]:
    one, other = fn.concentration1, fn.concentration0
    variance = torch.polygamma(1, one) + torch.polygamma(1, other)
    return torch.digamma(one) - torch.digamma(other), variance.sqrt()


def _student_t(fn: Any) -> tuple[Tensor, Tensor]:
    # Without a variance up to two degrees of freedom, and with a huge one shortly above.
    spread = fn.df / (fn.df - 2.0).clamp(min=1.0)
    return fn.loc, fn.scale * torch.where(fn.df > 3.0, spread, 3.0).sqrt()


def _filled(like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value)


_READ: Final[dict[type, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    dist.Normal: _normal,
    dist.LogNormal: _normal,
    dist.HalfNormal: _half_normal,
    dist.HalfCauchy: lambda fn: (fn.scale.log(), _filled(fn.scale, math.pi / 2.0)),
    dist.Gamma: lambda fn: _log_gamma(fn.concentration, fn.rate.log()),
    dist.Chi2: lambda fn: _log_gamma(fn.concentration, fn.rate.log()),
    dist.InverseGamma: _inverse_gamma,
    dist.Exponential: lambda fn: (-EULER - fn.rate.log(), _filled(fn.rate, math.pi / math.sqrt(6.0))),
    dist.Beta: _beta,
    dist.Uniform: lambda fn: (_filled(fn.low, 0.0), _filled(fn.low, math.pi / math.sqrt(3.0))),
    dist.StudentT: _student_t,
    dist.Laplace: lambda fn: (fn.loc, fn.scale * math.sqrt(2.0)),
    dist.Logistic: lambda fn: (fn.loc, fn.scale * math.pi / math.sqrt(3.0)),
    dist.Gumbel: lambda fn: (fn.loc + EULER * fn.scale, fn.scale * math.pi / math.sqrt(6.0)),
    dist.Cauchy: lambda fn: (fn.loc, fn.scale * 1.8),
}
"""Mean and standard deviation in the coordinates of ``biject_to(support)``, of a Cauchy a robust scale."""


def _of_transformed(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Of a normal that was shifted and scaled, or the exponential of one."""
    base = _peeled(fn.base_dist)
    if type(base) is not dist.Normal:
        return None
    loc, scale = base.loc, base.scale
    for i, step in enumerate(fn.transforms):
        if isinstance(step, torch.distributions.AffineTransform):
            factor = torch.as_tensor(step.scale)
            loc, scale = step.loc + factor * loc, factor.abs() * scale
        elif not (type(step) is ExpTransform and i == len(fn.transforms) - 1):
            return None
    return loc, scale


def normal_prior(latent: Latent, fn: Any) -> NormalPrior | None:
    """The prior of a latent as a normal in its unconstrained coordinates; None if none is known.

    Normal, LogNormal and MultivariateNormal are exact; others are matched in mean and standard deviation.

    :param latent: the site as it was at set-up.
    :param fn: its distribution now.

    Example::

        >>> fn = dist.LogNormal(torch.ones(2), 3.0)
        >>> latent = Latent.of({"fn": fn, "value": torch.ones(2)})
        >>> normal_prior(latent, fn).scale
        tensor([3., 3.])
    """
    own, shape = _peeled(fn), latent.free_shape
    if type(own) is dist.MultivariateNormal:
        width = shape[-1]
        if width > MAX_JOINT:
            return None
        if width == 1:
            return NormalPrior(own.loc.expand(shape), own.scale_tril[..., 0].expand(shape), False)
        return NormalPrior(own.loc.expand(shape), own.scale_tril.expand(*shape, width), True)
    read = _READ.get(type(own))
    found = _of_transformed(own) if type(own) is dist.TransformedDistribution else read and read(own)
    if found is None:
        return None
    loc, scale = found
    return NormalPrior(loc.expand(shape), scale.expand(shape), False)


def read_priors(
    model: Program, args: Any, kwargs: Mapping[str, Any], packing: Packing, free: Mapping[str, Tensor]
) -> dict[str, NormalPrior]:
    """The priors of those latents that have a known one, at values of all latents; by a run of the model.

    :param free: unconstrained values by site, of one point.

    Example::

        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("theta", dist.Normal(mu, 2.0))
        >>> sites = pyro.poutine.trace(model).get_trace().nodes
        >>> packing = Packing({name: sites[name] for name in ("mu", "theta")})
        >>> free = {"mu": torch.tensor(5.0), "theta": torch.tensor(0.0)}
        >>> read_priors(model, (), {}, packing, free)["theta"].loc
        tensor(5.)
    """
    values = {name: packing.latents[name].bijection(z) for name, z in free.items()}
    reader = _Reader(packing)
    with poutine.block(), pyro.validation_enabled(False), reader:
        poutine.condition(model, data=values)(*args, **kwargs)
    missing = [name for name in packing.latents if name not in reader.seen]
    if missing:
        raise KeyError(f"the sites {missing} are not drawn at every run")
    return reader.found


class _Reader(Messenger):
    """Reads each prior where the site stands: a program may change what it was made of later."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self._packing = packing
        self.seen: set[str] = set()
        self.found: dict[str, NormalPrior] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        latent = self._packing.latents.get(name)
        if latent is None or name in self.seen:
            return
        self.seen.add(name)
        prior = normal_prior(latent, msg["fn"])
        if prior is not None:
            self.found[name] = NormalPrior(prior.loc.clone(), prior.scale.clone(), prior.joint)
