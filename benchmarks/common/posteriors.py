"""Eight posteriors of posteriordb as Pyro models, with their reference draws.

Reads the folder layout of the public posteriordb (github.com/stan-dev/posteriordb), which is not part of this
project: :func:`load` takes a clone of it, or any folder with the same layout.  The models are written again
from their Stan programs.  None has a plate: vectors are events and scalars gain a last dimension by hand, so
that a plate of particles works at any negative dimension.

Two maps join the sites of a model to the parameters of posteriordb: ``to_parameters`` (theta = mu + tau *
theta_trans, say) and its inverse ``to_sites``, which carries the reference draws to the space in which guides
work.  :func:`stein` checks a model there: where p is the density that the draws come from,

    E[w ∂_j log p + ∂_j w] = 0   and   E[w (z_i - c_i) ∂_j log p + (z_i - c_i) ∂_j w + w δ_ij] = 0

for a constant c and a smooth weight w.  The weight is 1 but for the centred eight schools: ∂ log p / ∂ theta
is of the order 1 / tau there, and the density of tau is positive at 0, so that its expectation does not
exist; w = tau² / (1 + tau²) makes all moments finite.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.nn.functional import pad

from pyro_flowvi._program.start_trace import prototype

Sites = Mapping[str, Tensor]
Array = NDArray[np.float64]


def flat(name: str, support: Any, *event_shape: int) -> Tensor:
    """A site with the constant density 1, which is not normalised."""
    value: Tensor = pyro.sample(name, dist.ImproperUniform(support, (), event_shape))
    return value


def normal_vector(name: str, size: int, scale: float) -> Tensor:
    value: Tensor = pyro.sample(name, dist.Normal(0.0, scale).expand([size]).to_event(1))
    return value


def column(scalar: Tensor) -> Tensor:
    """A last dimension for a site that is a scalar: what a vector of each particle is scaled or moved by."""
    return scalar.unsqueeze(-1)


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    schools = dist.Normal(column(mu), column(tau)).expand(mu.shape + y.shape)
    theta = pyro.sample("theta", schools.to_event(1))
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    theta_trans = normal_vector("theta_trans", len(y), 1.0)
    pyro.sample("y", dist.Normal(column(mu) + column(tau) * theta_trans, sigma).to_event(1), obs=y)


def decaying_sum(x: Tensor, decay: Tensor) -> Tensor:
    """s_t = x_t + decay * s_{t-1} along the last dimension, ``(*, T)`` and ``(*,)``, in log2(T) steps.

    One step doubles the lags that a sum reaches: (1 + a L)(1 + a² L²)(1 + a⁴ L⁴)... = Σ_k (a L)^k.
    """
    power, lag = column(decay), 1
    while lag < x.shape[-1]:
        x = x + power * pad(x[..., :-lag], (lag, 0))
        power, lag = power * power, 2 * lag
    return x


def garch11(y: Tensor, sigma1: Tensor) -> None:
    mu = flat("mu", constraints.real)
    alpha0 = flat("alpha0", constraints.positive)
    # (alpha1, beta1) is uniform on a triangle, and so are two parts of a flat Dirichlet.
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
    news = column(alpha0) + parts[..., :1] * (y[:-1] - column(mu)).square()
    first = sigma1.square().expand(news.shape[:-1] + (1,))
    variance = decaying_sum(torch.cat([first, news], -1), parts[..., 1])
    pyro.sample("y", dist.Normal(column(mu), variance.sqrt()).to_event(1), obs=y)


def ark(lags: Tensor, y: Tensor) -> None:
    """``lags``, shape ``(len(y), K)``, has the K values before each y, the latest first."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = normal_vector("beta", lags.shape[-1], 10.0)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(column(alpha) + beta @ lags.T, column(sigma)).to_event(1), obs=y)


def low_dim_gauss_mix(y: Tensor) -> None:
    mu = flat("mu", constraints.ordered_vector, 2)
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = torch.stack([theta, 1.0 - theta], -1)
    components = dist.Normal(mu.unsqueeze(-2), sigma.unsqueeze(-2))
    mixture = dist.MixtureSameFamily(dist.Categorical(weights.unsqueeze(-2)), components)
    pyro.sample("y", mixture.expand(theta.shape + y.shape).to_event(1), obs=y)


def gp_cholesky(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    """The Cholesky factor of the kernel, ``(*, N, N)``; NaN where rounding leaves it not positive definite.

    Of a batch, ``torch.linalg.cholesky`` raises for all if one matrix fails.
    """
    distances = (x.unsqueeze(-1) - x) / rho[..., None, None]
    kernel = alpha[..., None, None].square() * (-0.5 * distances.square()).exp()
    factor, failed = torch.linalg.cholesky_ex(kernel + 1e-10 * torch.eye(len(x)))
    return torch.where(failed[..., None, None] == 0, factor, torch.nan)


def gp_pois_regr(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = normal_vector("f_tilde", len(x), 1.0)
    f = (gp_cholesky(x, rho, alpha) @ column(f_tilde)).squeeze(-1)
    # Validation would raise for all particles where one is NaN.
    pyro.sample("k", dist.Poisson(f.exp(), validate_args=False).to_event(1), obs=k)


def kidscore_momhsiq(x: Tensor, y: Tensor) -> None:
    beta = flat("beta", constraints.real_vector, x.shape[-1])
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(beta @ x.T, column(sigma)).to_event(1), obs=y)


def blr(x: Tensor, y: Tensor) -> None:
    beta = normal_vector("beta", x.shape[-1], 10.0)
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    pyro.sample("y", dist.Normal(beta @ x.T, column(sigma)).to_event(1), obs=y)


def _same(values: Sites, *args: Tensor) -> dict[str, Tensor]:
    return dict(values)


def _one(sites: Sites) -> Tensor:
    return torch.ones(())


@dataclass(frozen=True)
class Recipe:
    """A model, how its arguments come from the data, and its sites from the parameters and back.

    ``to_parameters`` and ``to_sites`` also take the model's arguments.  ``weight`` is w of :func:`stein`.
    """

    model: Callable[..., None]
    arguments: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    to_parameters: Callable[..., dict[str, Tensor]] = _same
    to_sites: Callable[..., dict[str, Tensor]] = _same
    weight: Callable[[Sites], Tensor] = _one


def _schools(data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return data["y"], data["sigma"]


def _theta(s: Sites, *args: Tensor) -> dict[str, Tensor]:
    theta = column(s["mu"]) + column(s["tau"]) * s["theta_trans"]
    return {"theta": theta, "mu": s["mu"], "tau": s["tau"]}


def _theta_trans(p: Sites, *args: Tensor) -> dict[str, Tensor]:
    theta_trans = (p["theta"] - column(p["mu"])) / column(p["tau"])
    return {"mu": p["mu"], "tau": p["tau"], "theta_trans": theta_trans}


def _alpha_beta(s: Sites, *args: Tensor) -> dict[str, Tensor]:
    alpha1, beta1, _ = s["parts"].unbind(-1)
    return {"mu": s["mu"], "alpha0": s["alpha0"], "alpha1": alpha1, "beta1": beta1}


def _parts(p: Sites, *args: Tensor) -> dict[str, Tensor]:
    parts = torch.stack([p["alpha1"], p["beta1"], 1.0 - p["alpha1"] - p["beta1"]], -1)
    return {"mu": p["mu"], "alpha0": p["alpha0"], "parts": parts}


def _f(s: Sites, x: Tensor, k: Tensor) -> dict[str, Tensor]:
    f = gp_cholesky(x, s["rho"], s["alpha"]) @ column(s["f_tilde"])
    return {"rho": s["rho"], "alpha": s["alpha"], "f": f.squeeze(-1)}


def _f_tilde(p: Sites, x: Tensor, k: Tensor) -> dict[str, Tensor]:
    factor = gp_cholesky(x, p["rho"], p["alpha"])
    f_tilde = torch.linalg.solve_triangular(factor, column(p["f"]), upper=False)
    return {"rho": p["rho"], "alpha": p["alpha"], "f_tilde": f_tilde.squeeze(-1)}


def _lags(data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    y, order = data["y"], int(data["K"])
    return y.unfold(0, order, 1)[:-1].flip(-1).contiguous(), y[order:]


def _kidiq(data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    ones = torch.ones_like(data["mom_hs"])
    return torch.stack([ones, data["mom_hs"], data["mom_iq"]], -1), data["kid_score"]


RECIPES = {
    "eight_schools-eight_schools_centered": Recipe(
        eight_schools_centered, _schools, weight=lambda s: s["tau"].square() / (1.0 + s["tau"].square())
    ),
    "eight_schools-eight_schools_noncentered": Recipe(
        eight_schools_noncentered, _schools, _theta, _theta_trans
    ),
    "garch-garch11": Recipe(garch11, lambda data: (data["y"], data["sigma1"]), _alpha_beta, _parts),
    "arK-arK": Recipe(ark, _lags),
    "low_dim_gauss_mix-low_dim_gauss_mix": Recipe(low_dim_gauss_mix, lambda data: (data["y"],)),
    "gp_pois_regr-gp_pois_regr": Recipe(gp_pois_regr, lambda data: (data["x"], data["k"]), _f, _f_tilde),
    "kidiq-kidscore_momhsiq": Recipe(kidscore_momhsiq, _kidiq),
    "sblri-blr": Recipe(blr, lambda data: (data["X"], data["y"])),
}


@dataclass(frozen=True)
class Posterior:
    """A model with its data and reference draws.

    :param reference: posteriordb's name of each scalar, such as ``theta[1]`` -> draws, ``(10000,)``.
    """

    name: str
    recipe: Recipe
    args: tuple[Tensor, ...]
    reference: dict[str, Array] = field(repr=False)

    @property
    def model(self) -> Callable[..., None]:
        return self.recipe.model

    def parameters(self, sites: Sites) -> dict[str, Array]:
        """Draws of all sites, each ``(n, ...)``, as draws of posteriordb's scalars, each ``(n,)``."""
        result = {}
        with torch.no_grad():
            values = self.recipe.to_parameters(sites, *self.args)
        for name, value in values.items():
            if value.dim() == 1:
                result[name] = value.double().cpu().numpy()
            else:
                columns = value.double().cpu().numpy().T
                result |= {f"{name}[{i}]": draws for i, draws in enumerate(columns, 1)}
        return result

    def reference_sites(self) -> dict[str, Tensor]:
        """The reference draws as draws of the model's sites."""
        groups: dict[str, list[Array]] = {}
        for name, draws in self.reference.items():  # theta[1], theta[2], ... are in this order
            groups.setdefault(re.sub(r"\[\d+\]$", "", name), []).append(draws)
        grouped = {
            name: torch.tensor(np.stack(draws, -1) if f"{name}[1]" in self.reference else draws[0])
            for name, draws in groups.items()
        }
        return self.recipe.to_sites(
            {k: v.to(torch.get_default_dtype()) for k, v in grouped.items()}, *self.args
        )

    def _latents(self) -> Iterator[tuple[str, Any]]:
        for name, site in prototype(self.model, self.args).nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                yield name, site

    def pack(self, sites: Sites) -> Tensor:
        """Draws of all sites as unconstrained vectors, ``(n, D)``, in the order of ``UnconstrainedModel``."""
        parts = [biject_to(site["fn"].support).inv(sites[name]) for name, site in self._latents()]
        return torch.cat([part.reshape(len(part), -1) for part in parts], -1)

    def unpack(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The inverse of :meth:`pack`, and log |det| of its Jacobian, shape ``(n,)``."""
        sites, log_det, start = {}, torch.zeros(len(z)), 0
        for name, site in self._latents():
            bijection, shape = biject_to(site["fn"].support), site["value"].shape
            free_shape = bijection.inverse_shape(shape)
            free = z[:, start : (start := start + free_shape.numel())].reshape(-1, *free_shape)
            sites[name] = bijection(free)
            part = bijection.log_abs_det_jacobian(free, sites[name])
            log_det = log_det + part.reshape(len(z), -1).sum(-1)
        return sites, log_det

    def log_density(self, z: Tensor) -> Tensor:
        """log p(data, x(z)) + log |det dx/dz|, of ``(n, D)`` shape ``(n,)``, by one run of the model."""
        sites, log_det = self.unpack(z)
        with pyro.plate("draws", len(z), dim=-1):
            trace = poutine.trace(poutine.condition(self.model, data=sites)).get_trace(*self.args)
        trace.compute_log_prob()
        terms = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
        return torch.stack([term.expand(len(z)) for term in terms]).sum(0) + log_det


def load(folder: str | Path, names: Iterable[str] = tuple(RECIPES)) -> dict[str, Posterior]:
    """The posteriors of a posteriordb folder, by name; tensors have torch's default dtype.

    :param folder: a clone of posteriordb, or its ``posterior_database``.
    :param names: which ones.
    :raises FileNotFoundError: if a file of the layout is missing.
    """
    root = _root(folder)
    posteriors = {}
    for name in names:
        about = json.loads((root / "posteriors" / f"{name}.json").read_text())
        data = read_data(root, about["data_name"])
        draws = root / "reference_posteriors" / "draws" / "draws"
        chains = _unzip(draws / f"{about['reference_posterior_name']}.json.zip")
        reference = {key: np.concatenate([chain[key] for chain in chains]) for key in chains[0]}
        posteriors[name] = Posterior(name, RECIPES[name], RECIPES[name].arguments(data), reference)
    return posteriors


def read_data(folder: str | Path, name: str) -> dict[str, Tensor]:
    """One data set of a posteriordb folder; tensors have torch's default dtype."""
    values = _unzip(_root(folder) / "data" / "data" / f"{name}.json.zip")
    return {key: torch.tensor(value, dtype=torch.get_default_dtype()) for key, value in values.items()}


def _root(folder: str | Path) -> Path:
    root = Path(folder)
    return root / "posterior_database" if (root / "posterior_database").is_dir() else root


def _unzip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def stein(posterior: Posterior, num_draws: int = 10_000) -> tuple[Array, Array]:
    """How many standard errors the reference draws are off Stein's identities.

    The standard errors take the draws for independent, as posteriordb's are to be; c is their mean.

    :return: for ∂_j, shape ``(D,)``, and for (z_i - c_i) ∂_j, shape ``(D, D)``.
    """
    z = posterior.pack(posterior.reference_sites())[:num_draws].detach().requires_grad_()
    weight = posterior.recipe.weight(posterior.unpack(z)[0]).expand(len(z))
    (gradient,) = torch.autograd.grad(posterior.log_density(z).sum(), z)
    slope = torch.zeros_like(z)
    if weight.requires_grad:
        (slope,) = torch.autograd.grad(weight.sum(), z)
    weight, centred = weight.detach(), (z - z.mean(0)).detach()
    first = column(weight) * gradient + slope
    second = centred.unsqueeze(-1) * first.unsqueeze(-2)
    second = second + weight[:, None, None] * torch.eye(z.shape[-1])

    def errors(values: Tensor) -> Array:
        result: Array = (values.mean(0) / values.std(0) * len(values) ** 0.5).numpy()
        return result

    return errors(first), errors(second)
