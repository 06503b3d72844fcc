"""How many components: the fewest that the likelihood of held-out rows bears, and that are apart."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from ._columns import Rows
from ._partitions import in_one_unit, neighbour_graph
from ._search import StartSearch
from ._training import MixtureTrainer
from ._trials import GAUSSIAN, HELD_OUT_FROM, Settings, Split, Start
from .vmonf import VMoNF

__all__ = ["Counting", "count_components"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
MAX_ROWS: Final = 10_000
"""Rows that are counted with."""
MAX_COMPONENTS: Final = 25
ROWS_EACH: Final = 20
"""Rows for each component, at least."""
FURTHER: Final = 3
"""Components beyond the best number that are looked at."""
FOLDS: Final = 3
STEPS: Final = 500
ERRORS: Final = 3.0
NATS: Final = 0.05
"""One number of components is better than another from so many standard errors on, and so many nats for each
row of one component."""
LEVEL: Final = 0.2
"""Rows are connected by rows whose density is so much of that of a typical row of their component."""
LEAST_SHARE: Final = 0.02
"""Of all rows, what a connected part has."""
ERRORS_CONNECTED: Final = 2.0
"""Standard errors by which connected parts may be worse than more components."""
COUNTED_BY: Final = (GAUSSIAN, "realnvp")
"""The better one of these, unless one of them is asked for.  By the likelihood, one component of splines is
often enough: they can describe several clusters at once."""


@dataclass
class Counting:
    """What was found.

    :param num: the number of components.
    :param nlls: the held-out negative log likelihood of each number that was looked at.
    :param parts: a partition of all rows into as many, if there is one.

    Example::

        >>> Counting(2).num
        2
    """

    num: int
    nlls: dict[int, float] = field(default_factory=dict)
    parts: Labels | None = None


def count_components(
    rows: Rows, least: int, settings: Settings, random_state: Any, device: torch.device
) -> Counting:
    """The number of components of a mixture of flows.

    Mixtures of 1, 2, ... Gaussians and affine coupling flows are trained on folds of the rows; the fewest
    are taken that are not clearly worse in held-out likelihood than any more.  Affine couplings bend and
    stretch a normal, but cannot close it to a ring, or branch it: components between which the density does
    not fall are one, if splines with that fewer components describe the data as well.

    :param rows: the rows.
    :param least: the number of components at least.
    :param settings: how to train.
    :param random_state: a ``numpy.random.RandomState``.
    :param device: where to train.

    Example::

        >>> x = np.concatenate([np.random.randn(100, 1) - 9, np.random.randn(100, 1) + 9])
        >>> rows = Rows(x / 9, np.full(200, -1), np.ones(200), np.arange(200))
        >>> settings = Settings("auto", "auto", 1, 2, (4,), 100, 64, 8e-3, 0.05, 0.15, 0.1, 10, 0)
        >>> count_components(rows, 1, settings, np.random.RandomState(0), torch.device("cpu")).num
        2
    """
    if len(rows.z) < HELD_OUT_FROM:
        return Counting(least)
    counter = _Counter(rows, settings, random_state, device)
    return counter.connected(counter.by_likelihood(least))


@dataclass
class _Trial:
    """The best start of a number of components, with its flow, and the scores of all rows, fold by fold."""

    start: Start
    scores: Array


class _Counter:
    """Numbers of components on the same folds."""

    def __init__(self, rows: Rows, settings: Settings, random_state: Any, device: torch.device) -> None:
        self.random_state, self.device = random_state, device
        self.flows = (settings.flow,) if settings.flow in COUNTED_BY else COUNTED_BY
        self.full_steps = settings.max_iter
        self.settings = replace(settings, max_iter=min(STEPS, settings.max_iter))
        self.all, size = rows, len(rows.z)
        some = np.sort(random_state.permutation(size)[:MAX_ROWS])
        self.rows = Rows(rows.z[some], rows.codes[some], rows.counts[some], some)
        folds = np.array_split(random_state.permutation(len(some)), FOLDS)
        self.splits: list[Split] = [
            (np.setdiff1d(np.arange(len(some)), fold), np.sort(fold)) for fold in folds
        ]
        self.tried: dict[int, _Trial] = {}

    def _search(self, num: int) -> StartSearch:
        search = StartSearch(self.rows, num, self.settings, self.random_state, self.device)
        search.train, search.held_out = self.splits[0]
        return search

    def by_likelihood(self, least: int) -> int:
        """The fewest components that none of more are clearly better than."""
        most = max(least, min(MAX_COMPONENTS, len(self.rows.z) // ROWS_EACH))
        best = num = least
        while num <= min(most, best + FURTHER):
            trials = [self._trial(num, flow) for flow in self.flows]
            self.tried[num] = min(trials, key=lambda each: float(each.scores.mean()))
            best = next(k for k in self.tried if not any(self._worse(k, m) for m in self.tried if m > k))
            num += 1
        return best

    def _trial(self, num: int, flow: str) -> "_Trial":
        """The better one of the two most promising starts, with scores on all folds."""
        search = self._search(num)
        ranked = search.ranked(search.candidates(), flow)
        promising = [ranked[0], *sorted(ranked[1:], key=lambda each: each.nll)[:1]]
        trainer, first = search.trainer(flow), self.splits[0]
        found = [(search.scores(trainer, start, search.steps, first), start) for start in promising]
        scores, start = min(found, key=lambda each: float(each[0].mean()))
        return _Trial(
            start, np.concatenate([scores, self._of_folds(trainer, search, start, search.steps, 1)])
        )

    def _of_folds(
        self, trainer: MixtureTrainer, search: StartSearch, start: Start, steps: int, after: int = 0
    ) -> Array:
        return np.concatenate([search.scores(trainer, start, steps, split) for split in self.splits[after:]])

    def _worse(self, few: int, many: int) -> bool:
        gain = self.tried[few].scores - self.tried[many].scores
        error = float(gain.std()) / math.sqrt(len(gain))
        needed = NATS * sum(1.0 / k for k in range(few + 1, many + 1))
        return bool(gain.mean() > max(ERRORS * error, needed))

    def connected(self, num: int) -> Counting:
        """That number, or fewer if components are connected."""
        nlls = {k: float(trial.scores.mean()) for k, trial in self.tried.items()}
        as_counted, search = Counting(num, nlls), self._search(num)
        flow, start = search.flows()[-1], self.tried[num].start
        if flow in COUNTED_BY or num == 1 or (self.rows.codes >= 0).any():  # labels say what is apart
            return as_counted
        trainer = search.trainer(start.flow)
        search.scores(trainer, start, search.steps, self.splits[0])
        parts = self._connected_parts(trainer.model)
        fewer = int(parts.max()) + 1
        if fewer >= num:
            return as_counted
        whole = self._search(fewer)
        connected = Start("connected", flow, parts)
        joined = self._of_folds(whole.trainer(flow), whole, connected, self.full_steps)
        loss = joined - self._of_folds(trainer, search, start, self.full_steps)
        if loss.mean() > ERRORS_CONNECTED * loss.std() / math.sqrt(len(loss)):
            return as_counted
        return Counting(fewer, nlls, self._of_all(parts))

    def _connected_parts(self, model: VMoNF) -> Labels:
        """Parts of the rows that are connected by rows of enough density; the others follow the nearest."""
        from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

        z, neighbors = self.rows.z, min(self.settings.n_neighbors, len(self.rows.z) - 1)
        with torch.no_grad():
            joint = model.joint_log_prob(torch.as_tensor(z).to(model.weights.logits))
        found, component = np.unique(joint.argmax(-1).cpu().numpy(), return_inverse=True)
        num = len(found)
        z = in_one_unit(z, np.arange(len(z)), self.rows.counts, num, self.random_state)
        near = NearestNeighbors(n_neighbors=neighbors + 1).fit(z).kneighbors(z)[0][:, 1:]
        log_density = _log_density(near)
        typical = np.array([np.median(log_density[component == k]) for k in range(num)])
        dense = np.flatnonzero(log_density >= typical[component] + math.log(LEVEL))
        _, piece = connected_components(neighbour_graph(z, neighbors)[dense][:, dense], directed=False)
        large = np.flatnonzero(np.bincount(piece) >= max(ROWS_EACH, LEAST_SHARE * len(z)))
        inside = np.isin(piece, large)
        if not inside.any():
            return np.asarray(component, dtype=np.int64)
        nearest = KNeighborsClassifier(1).fit(z[dense[inside]], np.searchsorted(large, piece[inside]))
        return np.asarray(nearest.predict(z), dtype=np.int64)

    def _of_all(self, parts: Labels) -> Labels:
        if len(parts) == len(self.all.z):
            return parts
        from sklearn.neighbors import KNeighborsClassifier

        found: Labels = KNeighborsClassifier(1).fit(self.rows.z, parts).predict(self.all.z)
        return found


def _log_density(distances: Array) -> Array:
    """Up to a constant, by the distances of neighbours, nearest first, shape ``(N, k)``.

    Of a curve it is one along the curve: the dimension is that of Levina and Bickel, *Maximum Likelihood
    Estimation of Intrinsic Dimension*, 2004, with MacKay and Ghahramani's mean of its inverse.
    """
    log = np.log(np.maximum(distances, np.finfo(float).tiny))
    dim = 1.0 / max(float((log[:, -1:] - log[:, :-1]).mean()), 1e-3)
    return np.asarray(-dim * log[:, -1])
