"""The search for the start and the flow of a mixture: all are trained briefly, the best in full."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ._partitions import warm_starts
from ._training import TrainingResult
from ._trials import GAUSSIAN, MixtureTrials, Start
from .vmonf import VMoNF

__all__ = ["SearchResult", "StartSearch"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
AUTO_FLOWS: Final = (GAUSSIAN, "realnvp", "neural_spline")
"""The last one ranks the starts: thin curves need splines.  In many columns the other one does it all, at a
fraction of the cost."""
SPLINES_UP_TO: Final = 8
AUTO_STARTS: Final = ("label_spreading", "neighbours", "spectral", "gmm", "kmeans")
"""By preference where the likelihood cannot tell them apart: what follows the data's shape comes first."""
LABELLED_STARTS: Final = ("label_spreading", "neighbours")
"""The same where every component has labelled rows: those that follow the labels from the beginning."""
SMALL_STARTS: Final = ("label_spreading", "kmeans")
"""The same where no rows are held out."""
BRIEF_SHARE: Final = 0.1
"""The share of the steps that every start is trained for."""
ENOUGH_STEPS: Final = 100
"""So many steps tell starts apart: with few rows, half of all steps at most."""
BEHIND_AT: Final = 0.4
"""The share of the steps from which a flow is given up that is behind another one after as many."""
FOLDS: Final = 2
ENOUGH_ROWS: Final = 1000
"""Starts are compared on as many splits of the rows, or until so many rows have been held out."""
CLOSE_NATS: Final = 0.03
"""Nats a row by which brief training cannot tell starts apart, however many rows there are."""
FAR_ERRORS: Final = 3.0
"""Standard errors behind the best from which a start is given up."""
PASSES, SHARE_POWER = 12, 0.7
"""How often rows that come later are trained on, and the power of their share of all that the rate has."""


@dataclass(frozen=True)
class SearchResult:
    """The best model, and how it was found.

    Example::

        >>> start = Start("kmeans", "realnvp", np.zeros(3, dtype=int))
        >>> SearchResult(VMoNF(1, 2), start, [start], 1.5, [2.0], [], False).nll
        1.5
    """

    model: VMoNF
    start: Start
    tried: list[Start]
    nll: float
    losses: list[float]
    checks: list[float]
    diverged: bool
    scores: Array = field(default_factory=lambda: np.empty(0))


class StartSearch(MixtureTrials):
    """Candidates on one data set.

    :param rows: the rows.
    :param num: the number of components.
    :param settings: how to train.
    :param random_state: a ``numpy.random.RandomState``.
    :param device: where to train.

    Example::

        >>> from pyro_flowvi.models.mixture._columns import Rows
        >>> from pyro_flowvi.models.mixture._trials import Settings
        >>> rows = Rows(np.random.randn(60, 2), np.full(60, -1), np.ones(60), np.arange(60))
        >>> settings = Settings("realnvp", "kmeans", 1, 2, (4,), 20, 32, 4e-3, 0.05, 0.15, 0.1, 10, 0)
        >>> search = StartSearch(rows, 2, settings, np.random.RandomState(0), torch.device("cpu"))
        >>> search.best().start.name
        'kmeans'
    """

    further: Sequence[Start] = ()
    """Starts from elsewhere, which come first where the likelihood cannot tell them from others."""

    def candidates(self) -> list[Start]:
        """Starts by the methods that there are."""
        settings = self.settings
        choose = len(self.held_out) > 0
        labelled = len(np.unique(self.codes[self.codes >= 0])) == self.num
        automatic = (LABELLED_STARTS if labelled else AUTO_STARTS) if choose else SMALL_STARTS
        names = automatic if settings.init == "auto" else (settings.init,)
        found: list[tuple[str, Labels]] = []
        for _ in range(settings.n_init if choose else 1):
            starts = warm_starts(
                names,
                self.z,
                self.codes,
                self.num,
                self.random_state,
                num_neighbors=settings.n_neighbors,
                counts=self.counts,
            )
            found += starts.items()
        return [Start(name, None, parts) for name, parts in (found if choose else found[:1])]

    def flows(self) -> tuple[Any, ...]:
        """Flows to choose from, the one that ranks starts last."""
        if self.settings.flow != "auto":
            return (self.settings.flow,)
        if not len(self.held_out):
            return ("realnvp",)
        return AUTO_FLOWS if self.dim <= SPLINES_UP_TO else AUTO_FLOWS[:-1]

    def best(self) -> SearchResult:
        """The start of the best held-out likelihood after a while, and the flow of the best in the end."""
        flows = self.flows()
        found_starts = [*self.further, *self.candidates()]
        candidates = self.ranked(found_starts, flows[-1])
        found: SearchResult | None = None
        for flow in flows:
            start = candidates[0]
            if flow == GAUSSIAN and len(flows) > 1:
                start = min(self.ranked(found_starts, flow), key=lambda each: each.nll)
            model = self._model(flow)
            self._place(model, start.parts)
            one = self._finished(model, replace(start, flow=flow), candidates, rival=found)
            if found is None or self._better(one, found):
                found = one
        assert found is not None
        return found

    def _better(self, one: SearchResult, other: SearchResult) -> bool:
        """Whether its held-out likelihood is; as for Gaussians, whether clearly so."""
        if other.start.flow != GAUSSIAN or one.diverged or other.diverged:
            return (one.diverged, one.nll) < (other.diverged, other.nll)
        return _behind([one.scores, other.scores], {0, 1})[1] > 1.0

    def ranked(self, candidates: list[Start], flow: Any) -> list[Start]:
        """Best first, by paired differences over held-out rows; of those that are close the preferred one."""
        candidates = [replace(each, flow=flow) for each in candidates]
        if len(candidates) == 1:
            return candidates
        steps = max(round(BRIEF_SHARE * self.steps), min(ENOUGH_STEPS, self.steps // 2), 1)
        trainer = self.trainer(flow, brief=True)
        scores: list[list[Array]] = [[] for _ in candidates]
        left, split, rows = set(range(len(candidates))), (self.train, self.held_out), 0
        for _ in range(FOLDS):
            for i in sorted(left):
                scores[i].append(self.scores(trainer, candidates[i], steps, split))
            behind = _behind([np.concatenate(each) for each in scores], left)
            means = {i: _mean(scores[i]) for i in left}
            best = min(means.values())
            close = {i for i in left if means[i] - best < CLOSE_NATS or behind[i] <= 1.0}
            left = {i for i in left if behind[i] < FAR_ERRORS} | close
            rows += len(split[1])
            if len(left) == 1 or rows >= ENOUGH_ROWS:
                break
            split = self._split()
        ranked = [each.scored(_mean(score)) for each, score in zip(candidates, scores, strict=True)]
        winner = min(close)
        order = sorted(range(len(ranked)), key=lambda i: (i != winner, i not in left, ranked[i].nll))
        return [ranked[i] for i in order]

    def continued(self, model: VMoNF, flow: Any) -> SearchResult:
        """That model, trained further on these rows."""
        model = self._based(model, flow, torch.float32)
        with torch.no_grad():
            joint = model.joint_log_prob(self._tensor(self.z))
        start = Start("warm_start", flow, joint.argmax(-1).cpu().numpy())
        return self._finished(model, start, [start], from_start=False)

    def more_rows(self, model: VMoNF, flow: Any, share: float) -> SearchResult:
        """That model after a few passes over these rows, which are a share of all that there have been."""
        model = self._based(model, flow, torch.float32)
        self.train, self.held_out = np.arange(len(self.z)), np.empty(0, dtype=np.int64)
        trainer = self._trainer(model, lr=share**SHARE_POWER * self.settings.learning_rate, noise=0.0)
        before = model.mixture().weights.detach()
        rows = self._rows(self.train, np.zeros(len(self.z), dtype=np.int64))
        parts = trainer.responsibilities(rows.x, rows.allowed).argmax(-1).cpu().numpy()
        start = Start("partial_fit", flow, parts)
        nll = trainer.nll(rows)
        steps = math.ceil(PASSES * float(self.counts.sum()) / self.settings.batch_size)
        outcome = self._run(trainer, start, steps, "going on", from_start=False)
        own = trainer.responsibilities(rows.x, rows.allowed)
        counts = own.new_ones(len(own)) if rows.counts is None else rows.counts
        model.weights.logits.data.copy_(before.lerp(counts @ own / counts.sum(), share).log())
        trainer.release()
        return self._result(model, start, [start.scored(nll)], replace(outcome, nll=nll))

    def _finished(
        self,
        model: VMoNF,
        start: Start,
        tried: list[Start],
        *,
        from_start: bool = True,
        rival: SearchResult | None = None,
    ) -> SearchResult:
        """Trains in full, or gives up against a rival that was ahead at that point."""
        trainer = self._trainer(model)

        def hopeless(done: float, check: int, nll: float) -> bool:
            if rival is None or done < BEHIND_AT or check >= len(rival.checks):
                return False
            return nll > rival.checks[check]

        outcome = self._run(trainer, start, self.steps, "fitting", from_start=from_start, stop=hopeless)
        scores = np.empty(0)
        if not len(self.held_out):
            tried = [replace(each, reason="no rows were held out") for each in tried]
            outcome = replace(outcome, nll=math.inf)
        else:
            scores = self._held_out_scores(trainer, start, (self.train, self.held_out))
            if len(tried) == 1:  # nothing to choose from: it was not scored after brief training
                tried = [start.scored(outcome.nll)]
        trainer.release()
        return replace(self._result(model, start, tried, outcome), scores=scores)

    def _result(
        self,
        model: VMoNF,
        start: Start,
        tried: list[Start],
        outcome: TrainingResult,
    ) -> SearchResult:
        # Double precision, so that a row's score does not depend on the rows beside it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        model = self._based(model, start.flow, dtype)
        nll = outcome.nll if math.isfinite(outcome.nll) else math.inf
        return SearchResult(
            model,
            start,
            tried,
            nll,
            outcome.losses,
            outcome.checks,
            outcome.diverged,
        )


def _mean(scores: list[Array]) -> float:
    value = float(np.concatenate(scores).mean())
    return value if math.isfinite(value) else math.inf


def _behind(scores: list[Array], among: set[int]) -> dict[int, float]:
    """By how many standard errors each is worse than the best, in the mean over the same rows."""
    best = min(among, key=lambda i: _mean([scores[i]]))
    behind = dict.fromkeys(among, math.inf)
    for i in among:
        if i != best and not math.isfinite(_mean([scores[i]])):
            continue
        difference = scores[i] - scores[best] if i != best else np.zeros(1)
        error = float(difference.std()) / math.sqrt(len(difference))
        behind[i] = float(difference.mean()) / error if error > 0 else 0.0
    return behind
