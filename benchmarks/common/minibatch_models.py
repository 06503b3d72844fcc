"""Models whose data come in minibatches, as users write them, each with its data from a seed.

    task = TASKS["10,000 normal groups"]()
    guide = AutoRealNVP(task.problem.model)
    fit(task.problem.model, guide, *task.problem.args, batches=task.batches(0))

The data are those of ``structured_models.py`` where that has the model, with the same truth.  ``full`` is the
same posterior from all data in one step, of which a fit to minibatches should not be able to be told.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import structured_models
from benchmarks.common.structured_problem import Data, Problem, some

PLATE = "groups"


def by_the_model(seed: int) -> None:
    """No batches: the model's plate draws its rows itself."""


@dataclass(frozen=True)
class Task:
    """A model that sees ``batch`` of ``size`` rows at a time.

    :param problem: the model, with the arguments of each step; those of ``batches`` come in their place.
    :param full: the same posterior, with a model that sees all data.
    :param batches: from a seed what ``fit`` takes as ``batches``.
    :param locals: the sites in the plate.
    :param steps: of stock SVI, as many passes as a user may well have patience for.
    """

    problem: Problem
    full: Problem
    size: int
    batch: int
    locals: tuple[str, ...] = ()
    batches: Callable[[int], Any] = by_the_model
    steps: int = 3000

    def rows(self) -> Iterator[Tensor]:
        """All rows once, ``batch`` at a time."""
        return iter(torch.arange(self.size).split(self.batch))

    def passes(self, steps: int) -> float:
        """How often so many steps see each row, on average."""
        return steps * self.batch / self.size


@dataclass(frozen=True)
class Epochs:
    """Batches of rows in a random order, each row once an epoch.

    :param tensors: the data, by rows.
    """

    tensors: tuple[Tensor, ...]
    batch: int
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for rows in torch.randperm(len(self.tensors[0]), generator=generator).split(self.batch):
                yield tuple(tensor[rows] for tensor in self.tensors)


# -- groups --------------------------------------------------------------------------------------


def groups(size: int, likelihood: str, batch: int, *, by_index: bool = False) -> Task:
    """``structured_models.groups``; with ``by_index`` the rows of a step are an argument of the model."""
    full = structured_models.groups(size, likelihood)

    def model(y: Tensor, known: Tensor, subsample: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        count = None if by_index else batch
        with pyro.plate(PLATE, len(y), subsample_size=count, subsample=subsample) as rows:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            if likelihood == "normal":
                pyro.sample("y", dist.Normal(theta, known[rows]), obs=y[rows])
            elif likelihood == "Poisson":
                pyro.sample("y", dist.Poisson(theta.exp()), obs=y[rows])
            else:
                pyro.sample("y", dist.Binomial(known[rows], logits=theta), obs=y[rows])

    def indices(seed: int) -> Any:
        return ((*full.args, rows) for (rows,) in Epochs((torch.arange(size),), batch, seed))

    problem = Problem(full.truth, model, full.args, full.roots, full.locals)
    return Task(problem, full, size, batch, ("theta",), indices if by_index else by_the_model)


def slopes(size: int = 20_000, batch: int = 500) -> Task:
    """``structured_models.slopes_in_a_plate`` of more groups."""
    full = structured_models.slopes_in_a_plate(size)

    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        t = pyro.sample("t", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
        factor = pyro.sample("C", dist.LKJCholesky(2, 2.0))
        sig = pyro.sample("sig", dist.HalfNormal(2.0))
        with pyro.plate(PLATE, size, subsample_size=batch) as rows:
            ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=t[..., :, None] * factor))
            mean = ab[..., :1] + ab[..., 1:] * x[rows]
            pyro.sample("y", dist.Normal(mean, sig[..., None]).to_event(1), obs=y[rows])

    name = f"slopes of {size:,} groups"
    problem, full = (Problem(name, m, full.args, full.roots, full.locals) for m in (model, full.model))
    return Task(problem, full, size, batch, ("ab",))


REPEATS = 5


def counts(size: int, seed: int) -> Tensor:
    """REPEATS counts of each group."""
    data = Data(seed)
    theta = 0.5 + 0.8 * data.normal(size, 1)
    return torch.poisson(theta.exp().expand(-1, REPEATS), generator=data.generator)


def counts_by_arguments(size: int = 20_000, batch: int = 500) -> Task:
    """A few counts of each group, where nobody knows the indices of those that a step is given."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate(PLATE, len(y)), poutine.scale(scale=size / len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample(
                "y", dist.Poisson(theta.exp()[..., None].expand(*theta.shape, REPEATS)).to_event(1), obs=y
            )

    y = counts(size, 9)
    problem = Problem(f"{size:,} groups of counts", model, (y,), {"mu": "", "tau": "log"}, some("theta"))
    return Task(problem, problem, size, batch, ("theta",), lambda seed: Epochs((y,), batch, seed))


# -- no locals -----------------------------------------------------------------------------------


def logistic_data(size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Correlated columns."""
    data = Data(10)
    x = data.normal(size, dim) + 0.5 * data.normal(size, 1)
    w = 0.3 * data.normal(dim)
    return x, data.coins(-0.5 + x @ w)


def logistic(size: int = 100_000, dim: int = 50, batch: int = 500, *, loader: bool = False) -> Task:
    """A regression: the model's plate draws its rows, or a shuffling DataLoader has batches of them."""
    x, y = logistic_data(size, dim)

    def model(x: Tensor, y: Tensor, *, count: int | None = batch) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("columns", dim):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", size, subsample_size=count) as rows:
            pyro.sample("y", dist.Bernoulli(logits=b + w @ x[rows].T), obs=y[rows])

    def on_batch(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("columns", dim):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", size, subsample_size=len(y)):
            pyro.sample("y", dist.Bernoulli(logits=b + w @ x.T), obs=y)

    def batches(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(TensorDataset(x, y), batch, shuffle=True, generator=generator)

    roots, nothing = {"b": "", "w": ""}, some()
    problem = Problem("logistic regression", on_batch if loader else model, (x, y), roots, nothing)
    full = replace(problem, model=partial(model, count=None))
    return Task(problem, full, size, batch, batches=batches if loader else by_the_model)


TASKS: dict[str, Callable[[], Task]] = {
    "10,000 normal groups": partial(groups, 10_000, "normal", 200),
    "10,000 normal groups, by index": partial(groups, 10_000, "normal", 200, by_index=True),
    "1,000,000 normal groups": partial(groups, 1_000_000, "normal", 1000),
    "2,000 Poisson groups": partial(groups, 2000, "Poisson", 200),
    "2,000 binomial groups": partial(groups, 2000, "binomial", 200),
    "20,000 slopes": slopes,
    "20,000 groups of counts": counts_by_arguments,
    "logistic regression": logistic,
    "logistic regression, loader": partial(logistic, loader=True),
}
