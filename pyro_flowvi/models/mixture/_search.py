"""The search for the start and the flow of a mixture: all are trained briefly, the best in full."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Independent, StudentT
from torch import Tensor

from ..._bar import tqdm
from ._partitions import cluster_gaussians, warm_starts
from ._training import MixtureTrainer, TrainingResult, TrainingRows
from .vmonf import VMoNF

__all__ = ["SearchResult", "Settings", "Start", "StartSearch"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
AUTO_FLOWS: Final = ("neural_spline", "realnvp")
"""The first one ranks the starts: thin curves need splines.  In many columns the other one does it all, at a
fraction of the cost."""
SPLINES_UP_TO: Final = 8
AUTO_STARTS: Final = ("label_spreading", "neighbours", "spectral", "gmm", "kmeans")
"""By preference where the likelihood cannot tell them apart: what follows the data's shape comes first."""
LABELLED_STARTS: Final = ("label_spreading", "neighbours")
"""The same where every component has labelled rows: those that follow the labels from the beginning."""
SMALL_STARTS: Final = ("label_spreading", "kmeans")
"""The same where no rows are held out."""
SIZES: Final[dict[str, tuple[int, tuple[int, ...]]]] = {"realnvp": (6, (16,)), "neural_spline": (4, (32, 32))}
"""Layers and widths of the flows that "auto" chooses from."""
DEGREES_OF_FREEDOM: Final = 20.0
"""Degrees of freedom of the Student distribution under affine couplings, which magnify what is far out: with
a normal one, single rows can cost a hundred nats.  Splines are the identity there."""
WIDE_FROM: Final = 5
WIDE_LAYERS: Final = 4
"""So many columns and more are mixed by fewer affine couplings: their linear map does more."""
FULL_FROM: Final = 512
"""Rows from which all steps are taken."""
MIN_STEPS: Final = 20
BRIEF_SHARE: Final = 0.1
"""The share of the steps that every start is trained for."""
ENOUGH_STEPS: Final = 150
"""So many steps tell starts apart: with few rows, half of all steps at most."""
BEHIND_NATS: Final = 0.1
"""Nats a column by which a flow may be behind another one after half of the steps, and is trained on."""
FOLDS: Final = 3
ENOUGH_ROWS: Final = 1000
"""Starts are compared on as many splits of the rows, or until so many rows have been held out."""
FAR_ERRORS: Final = 3.0
"""Standard errors behind the best from which a start is given up."""
HELD_OUT_FROM: Final = 50
MIN_HELD_OUT: Final = 10
MAX_FLOOR: Final = 0.1
"""Of the noise that stays, in standard deviations of a column."""
MIN_FLOOR: Final = 1e-3


@dataclass(frozen=True)
class Settings:
    """The parameters of :class:`~pyro_flowvi.models.FlowMixture` that training depends on.

    Example::

        >>> Settings("auto", "auto", 1, None, None, 100, 256, 4e-3, 0.05, 0.15, 0.1, 10, 0).max_iter
        100
    """

    flow: str | Callable[[int], Any]
    init: str
    n_init: int
    num_layers: int | None
    hidden: Sequence[int] | None
    max_iter: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    noise: float
    validation_fraction: float
    n_neighbors: int
    verbose: int


@dataclass(frozen=True)
class Start:
    """A candidate: a partition of all rows and a flow, with its score and, if that is infinite, the reason.

    Example::

        >>> Start("kmeans", "realnvp", np.zeros(3, dtype=int)).reason
        'not scored'
    """

    name: str
    flow: Any
    parts: Labels
    nll: float = math.inf
    reason: str = "not scored"

    def scored(self, nll: float) -> "Start":
        """This one with its score; one that is not finite is infinite."""
        if math.isfinite(nll):
            return replace(self, nll=nll, reason="")
        return replace(self, nll=math.inf, reason="the likelihood of held-out rows is not finite")


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


class StartSearch:
    """Candidates on one data set.

    :param z: the standardised rows, shape ``(N, D)``.
    :param codes: the component of each row, or -1.
    :param num: the number of components.
    :param settings: how to train.
    :param random_state: a ``numpy.random.RandomState``.
    :param device: where to train.

    Example::

        >>> x = np.random.randn(60, 2)
        >>> settings = Settings("realnvp", "kmeans", 1, 2, (4,), 20, 32, 4e-3, 0.05, 0.15, 0.1, 10, 0)
        >>> state = np.random.RandomState(0)
        >>> search = StartSearch(x, np.full(60, -1), 2, settings, state, torch.device("cpu"))
        >>> search.best().start.name
        'kmeans'
    """

    def __init__(
        self,
        z: Array,
        codes: Labels,
        num: int,
        settings: Settings,
        random_state: Any,
        device: torch.device,
    ) -> None:
        # In the precision of training: then the rounding of other units does not lead elsewhere.
        self.z, self.codes, self.num = z.astype(np.float32).astype(np.float64), codes, num
        self.settings, self.random_state, self.device = settings, random_state, device
        self.dim = z.shape[1]
        self.seed = int(random_state.randint(2**31 - 1))
        self.train, self.held_out = self._split()
        share = min(1.0, len(self.train) / FULL_FROM)
        self.steps = max(min(MIN_STEPS, settings.max_iter), round(settings.max_iter * share))
        self.floor = self._floor()

    @staticmethod
    def offset(scale: Array) -> float:
        """What a mean negative log likelihood of standardised rows lacks to one of the rows."""
        return float(np.log(scale).sum())

    def _split(self) -> tuple[Labels, Labels]:
        """Rows to train with, and rows to choose by: the same share of each class, whole numbers below."""
        size, fraction = len(self.z), self.settings.validation_fraction
        if size < HELD_OUT_FROM:
            return np.arange(size), np.empty(0, dtype=np.int64)
        parts = []
        for code in np.unique(self.codes):
            rows = self.random_state.permutation(np.flatnonzero(self.codes == code))
            wanted = int(fraction * len(rows))
            parts.append(rows[: max(wanted, min(MIN_HELD_OUT, len(rows) // 3)) if code < 0 else wanted])
        held_out = np.sort(np.concatenate(parts))
        return np.setdiff1d(np.arange(size), held_out), held_out

    def _floor(self) -> float:
        """Noise that stays: about what a kernel density estimate would smooth by."""
        from sklearn.neighbors import NearestNeighbors

        rows = self.random_state.permutation(self.train)[:1000]
        pool = self.z[self.random_state.permutation(self.train)[:20_000]]
        near = NearestNeighbors(n_neighbors=min(2, len(pool))).fit(pool).kneighbors(self.z[rows])[0][:, -1]
        return float(np.clip(0.5 * np.median(near) / math.sqrt(self.dim), MIN_FLOOR, MAX_FLOOR))

    # -- models -------------------------------------------------------------------------------------

    def _model(self, flow: Any) -> VMoNF:
        settings = self.settings
        layers, hidden = settings.num_layers, settings.hidden
        if isinstance(flow, str) and flow in SIZES:
            usual = WIDE_LAYERS if self.dim >= WIDE_FROM else SIZES[flow][0]
            layers = usual if layers is None else layers
            hidden = SIZES[flow][1] if hidden is None else hidden
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.manual_seed(self.seed)
            model = VMoNF(self.num, self.dim, flow, num_layers=layers, hidden=hidden)
        return self._based(model, flow, torch.float32)

    def _based(self, model: VMoNF, flow: Any, dtype: torch.dtype) -> VMoNF:
        """The model on the device and in a dtype, and so its base.

        Alexanderson and Henter, *Robust model training and generalisation with Studentising flows*, 2020.
        """
        model = model.to(self.device, dtype)
        if flow == "realnvp":
            like = model.weights.logits.new_zeros(self.dim)
            base = StudentT(like + DEGREES_OF_FREEDOM, like, like + 1.0, validate_args=False)
            model.base = Independent(base, 1, validate_args=False)
        return model

    def _trainer(self, model: VMoNF) -> MixtureTrainer:
        settings = self.settings
        return MixtureTrainer(
            model,
            batch_size=settings.batch_size,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            noise=(settings.noise, self.floor),
            seed=self.seed,
        )

    def _place(self, model: VMoNF, parts: Labels, train: Labels | None = None) -> None:
        train = self.train if train is None else train
        values = cluster_gaussians(self.z[train], np.eye(self.num)[parts[train]])
        model.place(*(self._tensor(value) for value in values))

    def _tensor(self, value: Array) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.device)

    def _rows(self, index: Labels, parts: Labels) -> TrainingRows:
        code = torch.as_tensor(self.codes[index], device=self.device).unsqueeze(-1)
        allowed = (code < 0) | (code == torch.arange(self.num, device=self.device))
        return TrainingRows(
            self._tensor(self.z[index]), allowed, torch.as_tensor(parts[index], device=self.device)
        )

    def _run(
        self, trainer: MixtureTrainer, start: Start, steps: int, what: str, split: Any = None, **options: Any
    ) -> TrainingResult:
        train, chosen = (self.train, self.held_out) if split is None else split
        held_out = self._rows(chosen, start.parts) if len(chosen) else None
        flow = start.flow if isinstance(start.flow, str) else "flow"
        with tqdm(total=steps, disable=not self.settings.verbose, desc=f"{what} {start.name}, {flow}") as bar:
            outcome = trainer.run(
                self._rows(train, start.parts), steps, held_out, progress=bar.update, **options
            )
            bar.set_postfix_str(f"NLL {outcome.nll:.3f}")
        return outcome

    # -- search -------------------------------------------------------------------------------------

    def _candidates(self) -> list[Start]:
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
            )
            found += starts.items()
        return [Start(name, None, parts) for name, parts in (found if choose else found[:1])]

    def _flows(self) -> tuple[Any, ...]:
        if self.settings.flow != "auto":
            return (self.settings.flow,)
        return AUTO_FLOWS if len(self.held_out) and self.dim <= SPLINES_UP_TO else ("realnvp",)

    def best(self) -> SearchResult:
        """The start of the best held-out likelihood after a while, and the flow of the best in the end."""
        flows = self._flows()
        candidates = self._ranked(self._candidates(), flows[0])
        start = candidates[0]
        found: SearchResult | None = None
        for flow in flows:
            model = self._model(flow)
            self._place(model, start.parts)
            one = self._finished(model, replace(start, flow=flow), candidates, rival=found)
            if found is None or (one.diverged, one.nll) < (found.diverged, found.nll):
                found = one
        assert found is not None
        return found

    def _ranked(self, candidates: list[Start], flow: Any) -> list[Start]:
        """Best first, by paired differences over held-out rows; within a standard error the preferred one."""
        candidates = [replace(each, flow=flow) for each in candidates]
        if len(candidates) == 1:
            return candidates
        steps = max(round(BRIEF_SHARE * self.steps), min(ENOUGH_STEPS, self.steps // 2), 1)
        model = self._model(flow)
        trainer = self._trainer(model)
        fresh = trainer.flat.clone()
        scores: list[list[Array]] = [[] for _ in candidates]
        left, split, rows = set(range(len(candidates))), (self.train, self.held_out), 0
        for _ in range(FOLDS):
            for i in sorted(left):
                trainer.flat.copy_(fresh)
                self._place(model, candidates[i].parts, split[0])
                self._run(trainer, candidates[i], steps, "trying", split)
                scores[i].append(-trainer.log_prob(self._rows(split[1], candidates[i].parts)).cpu().numpy())
            behind = _behind([np.concatenate(each) for each in scores], left)
            left = {i for i in left if behind[i] < FAR_ERRORS}
            rows += len(split[1])
            if len(left) == 1 or rows >= ENOUGH_ROWS:
                break
            split = self._split()
        ranked = [each.scored(_mean(score)) for each, score in zip(candidates, scores, strict=True)]
        winner = min(i for i in left if behind[i] <= 1.0)
        order = sorted(range(len(ranked)), key=lambda i: (i != winner, i not in left, ranked[i].nll))
        return [ranked[i] for i in order]

    def continued(self, model: VMoNF, flow: Any) -> SearchResult:
        """That model, trained further on these rows."""
        model = self._based(model, flow, torch.float32)
        with torch.no_grad():
            joint = model.joint_log_prob(self._tensor(self.z))
        start = Start("warm_start", flow, joint.argmax(-1).cpu().numpy())
        return self._finished(model, start, [start], from_start=False)

    def _finished(
        self,
        model: VMoNF,
        start: Start,
        tried: list[Start],
        *,
        from_start: bool = True,
        rival: SearchResult | None = None,
    ) -> SearchResult:
        """Trains in full, or gives up halfway against a rival that is far ahead at that point."""
        trainer = self._trainer(model)

        def hopeless(check: int, nll: float) -> bool:
            if rival is None or check != len(rival.checks) // 2 or not rival.checks:
                return False
            return bool(nll > rival.checks[check] + BEHIND_NATS * self.dim)

        outcome = self._run(trainer, start, self.steps, "fitting", from_start=from_start, stop=hopeless)
        trainer.release()
        # Double precision, so that a row's score does not depend on the rows beside it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        model = self._based(model, start.flow, dtype)
        if not len(self.held_out):
            tried = [replace(each, reason="no rows were held out") for each in tried]
        elif len(tried) == 1:  # nothing to choose from: it was not scored after brief training
            tried = [start.scored(outcome.nll)]
        nll = outcome.nll if len(self.held_out) and math.isfinite(outcome.nll) else math.inf
        return SearchResult(model, start, tried, nll, outcome.losses, outcome.checks, outcome.diverged)


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
