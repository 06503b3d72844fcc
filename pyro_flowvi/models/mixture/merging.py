"""How many components: the superfluous ones of a mixture of flows are merged, and it is said why."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from ..._checks import check_count, check_positive, check_positive_int
from ...transforms import Compose, Stacked
from ._parts import check_rows
from ._training import MixtureTrainer, TrainingRows
from .overlap import component_overlap
from .vmonf import VMoNF

__all__ = ["Annihilation", "Step", "annihilate"]

APART_OVERLAP: Final = 0.01
"""Overlap below which two components are two clusters, whatever a flow that bridges them may score."""
OUTLIER_SHARE: Final = 0.01
"""Share of a wide normal that is mixed in before likelihoods are compared: else a few rows in the tails,
whose log densities no comparison can trust, would decide."""
WIDE_SCALE: Final = 2.0
"""Its standard deviations, in those of the data."""
LEAST_MASS: Final = 1.0
"""Rows that a component must be expected to have made."""
PERSEVERANCE: Final = 4
"""How many times longer a merged component is trained that was not good enough at first."""
MIN_ROWS: Final = 20


@dataclass(frozen=True)
class Step:
    """One attempt at fewer components.

    :param num_components: before it.
    :param merged: the original components in the two that were to be one; with one tuple, that of a component
        without rows.
    :param overlap: of the two, from 0 to 1.
    :param hurt: by how much the held-out negative log likelihood rose, nats a row, outliers allowed for.
    :param standard_error: of ``hurt``, over held-out rows.
    :param accepted: whether it was done.

    Example::

        >>> print(Step(12, ((3,), (5, 11)), 0.26, 0.0021, 0.0034, True))
        12 -> 11: (3) and (5, 11) are one: NLL +0.0021 ± 0.0034, overlap 0.260
    """

    num_components: int
    merged: tuple[tuple[int, ...], ...]
    overlap: float
    hurt: float
    standard_error: float
    accepted: bool

    def __str__(self) -> str:
        names = [f"({', '.join(map(str, group))})" for group in self.merged]
        change = f"{self.num_components} -> {self.num_components - self.accepted}"
        measured = f"NLL {self.hurt:+.4f} ± {self.standard_error:.4f}"
        if len(names) == 1:
            return f"{change}: {names[0]} has no rows: {measured}"
        verdict = "are one" if self.accepted else "are two"
        return f"{change}: {names[0]} and {names[1]} {verdict}: {measured}, overlap {self.overlap:.3f}"


@dataclass(frozen=True)
class Annihilation:
    """What was left, and what became of the rest.

    :param model: the mixture with the components that were left; the one given is as it was.
    :param groups: for each of them the original components that it is made of.
    :param steps: all attempts in order, also those that were not accepted.
    :param nll_before: held-out negative log likelihood of the mixture that was given, nats a row.
    :param nll_after: and of ``model``.

    Example::

        >>> result = Annihilation(VMoNF(1, 2), ((0, 1),), (), 2.0, 1.9)
        >>> result.classes
        [0, 0]
        >>> print(result)
        2 -> 1 components, held-out NLL 2.0000 -> 1.9000
    """

    model: VMoNF
    groups: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...] = field(repr=False)
    nll_before: float
    nll_after: float

    @property
    def classes(self) -> list[int]:
        """The component that each original one has become part of; -1 for one that had no rows."""
        found = {old: new for new, group in enumerate(self.groups) for old in group}
        lost = [old for step in self.steps if len(step.merged) == 1 for old in step.merged[0]]
        return [found.get(old, -1) for old in range(len(found) + len(lost))]

    def __str__(self) -> str:
        head = f"{len(self.classes)} -> {len(self.groups)} components, "
        head += f"held-out NLL {self.nll_before:.4f} -> {self.nll_after:.4f}"
        return "\n".join([head, *map(str, self.steps)])


def annihilate(
    model: VMoNF,
    x: Tensor,
    *,
    min_components: int = 1,
    tolerance: float = 2.0,
    num_steps: int = 150,
    refine_steps: int = 60,
    lr: float = 1e-2,
    batch_size: int = 256,
    validation: float | Tensor = 0.2,
    seed: int = 0,
) -> Annihilation:
    r"""Merges components of a trained mixture as long as the held-out likelihood bears it.

    The two components that overlap most become one: the heavier is trained on the rows of both, the others
    as they are, and it stays if the held-out negative log likelihood has not risen by more than
    ``tolerance`` standard errors of the paired difference; then all are trained for a moment.  If it has
    risen, training goes on for a while, and if that does not help, the two stay two and the next pair is
    tried; once there is none, those that stayed two are tried again if others have changed.  It ends when no
    pair that overlaps is left: a flow can bridge two clusters with a ridge that costs little, so those that
    hardly overlap are not tried.  Components without rows go first.

    The classical rules look at weights alone, :math:`\pi_k \propto \max(0, n_k - t)`, and end with what t
    says.  A sparse Dirichlet prior, t < 1, leaves a wing that several flows share to all of them; minimum
    message length (Figueiredo and Jain, *Unsupervised Learning of Finite Mixture Models*, 2002), with t half
    the number of parameters of a component, removes every cluster if the flows are large.

    :param model: trained, with learned or Dirichlet weights; it is left as it is.
    :param x: rows of data, shape ``(N, D)``.
    :param min_components: where it ends at the latest.
    :param tolerance: how many standard errors fewer components may cost.
    :param num_steps: steps that a merged component is trained at first.
    :param refine_steps: steps that all components are trained after each merger.
    :param lr: Adam's rate at the start for a merged component; for all of them a tenth of it.
    :param batch_size: rows of a step.
    :param validation: the share of the rows to judge by, or rows of their own.
    :param seed: of the split, batches and noise.
    :return: the smaller mixture and a report.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> x = torch.cat([torch.randn(100, 2) - 6, torch.randn(100, 2) + 6])
        >>> locs = torch.tensor([[-6.0, -6.0], [6.0, 5.0], [6.0, 7.0]])
        >>> model = VMoNF(3, 2, num_layers=2, hidden=(4,)).place(locs, torch.eye(2).expand(3, 2, 2))
        >>> result = annihilate(model, x, num_steps=20, refine_steps=5)
        >>> result.classes
        [0, 1, 1]
    """
    check_rows(x, None, model.dim, model.num_classes)
    if model.weights_kind == "fixed":
        raise ValueError("model: expected learned or Dirichlet weights, got fixed ones")
    check_positive("tolerance", tolerance)
    efforts = [check_positive_int("num_steps", num_steps), PERSEVERANCE * num_steps]
    check_count("refine_steps", refine_steps)
    train, judge = _split(x, validation, seed)
    search = _Merger(
        copy.deepcopy(model), train, judge, lr, check_positive_int("batch_size", batch_size), seed
    )
    search.drop_empty(check_positive_int("min_components", min_components))
    given = search.nll()
    refused: set[frozenset[tuple[int, ...]]] = set()
    changed = False
    while search.model.num_components > min_components:
        pair = search.next_pair(refused)
        if pair is None:
            if not (refused and changed):
                break
            refused, changed = set(), False  # once more: the others have changed since
            continue
        if search.merge(*pair, efforts, tolerance):
            search.refine(refine_steps)
            changed = True
        else:
            refused.add(frozenset((search.groups[pair[0]], search.groups[pair[1]])))
    return Annihilation(search.model, tuple(search.groups), tuple(search.steps), given, search.nll())


def _split(x: Tensor, validation: float | Tensor, seed: int) -> tuple[Tensor, Tensor]:
    if isinstance(validation, Tensor):
        if validation.dim() != 2 or validation.shape[1:] != x.shape[1:] or not len(validation):
            raise ValueError(f"validation: expected shape (M, {x.shape[1]}), got {tuple(validation.shape)}")
        return x, validation
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation: expected a share between 0 and 1, or rows, got {validation!r}")
    if len(x) < MIN_ROWS:
        raise ValueError(f"x: expected at least {MIN_ROWS} rows, got {len(x)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu").to(x.device)
    count = max(2, round(validation * len(x)))
    return x[order[count:]], x[order[:count]]


@contextmanager
def _only(model: VMoNF, part: Any) -> Iterator[None]:
    """Within it, gradients reach that part's parameters alone."""
    wanted = {id(param) for param in part.parameters()}
    before = [(param, param.requires_grad) for param in model.parameters()]
    for param, _ in before:
        param.requires_grad_(param.requires_grad and id(param) in wanted)
    try:
        yield
    finally:
        for param, flag in before:
            param.requires_grad_(flag)


class _Merger:
    """The mixture as it shrinks."""

    def __init__(
        self, model: VMoNF, train: Tensor, judge: Tensor, lr: float, batch_size: int, seed: int
    ) -> None:
        self.model, self.train, self.judge = model, train, judge
        self.lr, self.batch_size, self.seed = check_positive("lr", lr), batch_size, seed
        self.own_classes = bool((model.classes.cpu() == torch.arange(model.num_components)).all())
        self.groups: list[tuple[int, ...]] = [(k,) for k in range(model.num_components)]
        self.steps: list[Step] = []
        self.generator = torch.Generator(train.device).manual_seed(seed)
        wide = torch.distributions.Normal(train.mean(0), WIDE_SCALE * train.std(0))
        self.wide = wide.log_prob(judge).sum(-1) + math.log(OUTLIER_SHARE)

    @torch.no_grad()
    def nll(self) -> float:
        return -float(self.model.log_prob(self.judge).mean())

    def _keep(self, indices: Sequence[int]) -> VMoNF:
        model = self.model.select(indices)
        if self.own_classes:
            model.classes = torch.arange(len(indices), device=model.classes.device)
            model.num_classes = len(indices)
        return model

    @torch.no_grad()
    def drop_empty(self, least: int) -> None:
        while self.model.num_components > least:
            mass = self.model.responsibilities(self.train).sum(0)
            k = int(mass.argmin())
            alone = (self.model.classes == self.model.classes[k]).sum() == 1
            if mass[k] >= LEAST_MASS or (alone and not self.own_classes):
                return
            num, before = self.model.num_components, self.model.log_prob(self.judge)
            self.model = self._keep([each for each in range(num) if each != k])
            rise = self._rise(before, self.model.log_prob(self.judge))
            self._note((self.groups.pop(k),), 0.0, rise, num, True)

    def _rise(self, before: Tensor, after: Tensor) -> Tensor:
        """Of the negative log likelihood of each held-out row."""
        first, second = (
            torch.logaddexp(each + math.log1p(-OUTLIER_SHARE), self.wide) for each in (before, after)
        )
        return first - second

    def _note(
        self, merged: tuple[tuple[int, ...], ...], overlap: float, rise: Tensor, num: int, accepted: bool
    ) -> None:
        hurt, error = _mean_and_error(rise)
        self.steps.append(Step(num, merged, overlap, hurt, error, accepted))

    def next_pair(self, refused: set[frozenset[tuple[int, ...]]]) -> tuple[int, int, float] | None:
        """The two that overlap most of those that may be one, the heavier first."""
        overlap = component_overlap(self.model, self.train, seed=self.seed)
        same = self.model.classes.unsqueeze(-1) == self.model.classes
        weights = self.model.mixture().weights
        best: tuple[int, int, float] | None = None
        for i in range(len(overlap)):
            for j in range(i):
                value = float(overlap[i, j])
                fits = self.own_classes or bool(same[i, j])
                new = frozenset((self.groups[i], self.groups[j])) not in refused
                if fits and new and value > (APART_OVERLAP if best is None else best[2]):
                    best = (i, j, value) if weights[i] > weights[j] else (j, i, value)
        return best

    def merge(self, heavy: int, light: int, overlap: float, steps: Sequence[int], tolerance: float) -> bool:
        with torch.no_grad():
            share = self.model.responsibilities(self.train)[:, [heavy, light]].sum(-1)
            joint = self.model.joint_log_prob(self.judge)
            log_weights = self.model.mixture().logits[[heavy, light]]
        one = self.model.select([heavy])
        others = [k for k in range(self.model.num_components) if k not in (heavy, light)]
        merged, accepted = (self.groups[heavy], self.groups[light]), False
        for count in steps:
            self._train_one(one, share, count)
            with torch.no_grad():
                new = one.mixture().component_log_prob(self.judge) + log_weights.logsumexp(0)
                after = torch.cat([joint[:, others], new], -1).logsumexp(-1)
            rise = self._rise(joint.logsumexp(-1), after)
            hurt, error = _mean_and_error(rise)
            accepted = hurt <= tolerance * error
            if accepted:
                break
        self._note(merged, overlap, rise, self.model.num_components, accepted)
        if accepted:
            self._replace(heavy, light, one)
        return accepted

    def _train_one(self, one: VMoNF, share: Tensor, num_steps: int) -> None:
        """Maximum likelihood on rows weighted by ``share``: the M step for that component."""
        drawn = torch.multinomial(share, len(self.train), replacement=True, generator=self.generator)
        with _only(one, one.components):
            self._run(one, self.train[drawn], num_steps, self.lr, 0.1)

    def _run(self, model: VMoNF, x: Tensor, num_steps: int, lr: float, noise: float) -> None:
        options: dict[str, Any] = {"batch_size": self.batch_size, "lr": lr, "noise": (noise, 0.0)}
        trainer = MixtureTrainer(model, seed=self.seed + len(self.steps), **options)
        trainer.run(TrainingRows.free(x, model.num_components), num_steps, from_start=False)
        trainer.release()

    def _replace(self, heavy: int, light: int, one: VMoNF) -> None:
        kept = [k for k in range(self.model.num_components) if k != light]
        place = kept.index(heavy)
        logits = self._logits(self.model).detach()
        total = torch.logaddexp(logits[heavy], logits[light])
        parts = [self.model.components.part(k) for k in kept]
        parts[place] = one.components.part(0)
        new = self._keep(kept)
        new.flow = Compose([Stacked(parts, dim=self.model.components.dim), *list(new.flow)[1:]])
        with torch.no_grad():
            self._logits(new)[place] = total
        union = tuple(sorted(self.groups[heavy] + self.groups[light]))
        self.groups = [union if k == heavy else self.groups[k] for k in kept]
        self.model = new

    @staticmethod
    def _logits(model: VMoNF) -> Tensor:
        return (model.weights_posterior if model.weights_kind == "dirichlet" else model.weights).logits

    def refine(self, num_steps: int) -> None:
        if not num_steps:
            return
        with _only(self.model, torch.nn.ModuleList([self.model.flow, self.model.weights])):
            self._run(self.model, self.train, num_steps, 0.1 * self.lr, 0.02)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / len(values) ** 0.5
