"""Mixtures of flows that are trained from a partition of the rows, and scored by rows that are held out."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Independent, StudentT
from torch import Tensor

from ..._bar import tqdm
from ..._noise import own_noise
from ...transforms.base import FlowTransform
from ._columns import Rows
from ._partitions import cluster_gaussians
from ._training import MixtureTrainer, TrainingResult, TrainingRows
from .vmonf import VMoNF

__all__ = ["MixtureTrials", "Settings", "Split", "Start"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Split = tuple[Labels, Labels]
"""Rows to train with, and rows to choose by."""
GAUSSIAN: Final = "gaussian"
"""The name of no flow: of :class:`Identity`."""
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
MANY_ROWS, MOST_STEPS = 20_000, 2.0
"""Rows from which more steps are taken, and up to what multiple: there is more to be learnt."""
MIN_STEPS: Final = 20
BRIEF_SPLINES: Final = 2
"""Layers of splines that tell starts apart."""
HELD_OUT_FROM: Final = 50
MIN_HELD_OUT: Final = 10
MAX_HELD_OUT: Final = 4000
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


@contextmanager
def _in_float32() -> Iterator[None]:
    """Within it torch's default dtype is float32, so that random numbers do not depend on what it was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Identity(FlowTransform):
    """The identity, of which a component's location and scale make a Gaussian.

    Example::

        >>> Identity(2)(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(y.shape[:-1])


class MixtureTrials:
    """Mixtures of one number of components on one data set.

    :param rows: the rows.
    :param num: the number of components.
    :param settings: how to train.
    :param random_state: a ``numpy.random.RandomState``.
    :param device: where to train.

    Example::

        >>> rows = Rows(np.random.randn(60, 2), np.full(60, -1), np.ones(60), np.arange(60))
        >>> settings = Settings("realnvp", "kmeans", 1, 2, (4,), 20, 32, 4e-3, 0.05, 0.15, 0.1, 10, 0)
        >>> trials = MixtureTrials(rows, 1, settings, np.random.RandomState(0), torch.device("cpu"))
        >>> len(trials.train), len(trials.held_out)
        (50, 10)
    """

    def __init__(
        self,
        rows: Rows,
        num: int,
        settings: Settings,
        random_state: Any,
        device: torch.device,
    ) -> None:
        # In the precision of training: then the rounding of other units does not lead elsewhere.
        self.z, self.codes, self.num = rows.z.astype(np.float32).astype(np.float64), rows.codes, num
        self.counts = rows.counts
        self.settings, self.random_state, self.device = settings, random_state, device
        self.dim = self.z.shape[1]
        self.seed = int(random_state.randint(2**31 - 1))
        self.train, self.held_out = self._split()
        size = float(self.counts[self.train].sum())
        share = min(size / FULL_FROM, 1.0) * min(max(size / MANY_ROWS, 1.0), MOST_STEPS)
        self.steps = max(min(MIN_STEPS, settings.max_iter), round(settings.max_iter * share))
        self.floor = self._floor()
        self._trainers: dict[Any, MixtureTrainer] = {}

    def _split(self) -> tuple[Labels, Labels]:
        """Rows to train with, and rows to choose by: the same share of each class, whole numbers below."""
        size, fraction = len(self.z), self.settings.validation_fraction
        if size < HELD_OUT_FROM:
            return np.arange(size), np.empty(0, dtype=np.int64)
        parts = []
        for code in np.unique(self.codes):
            rows = self.random_state.permutation(np.flatnonzero(self.codes == code))
            wanted = int(min(fraction, MAX_HELD_OUT / size) * len(rows))
            parts.append(rows[: max(wanted, min(MIN_HELD_OUT, len(rows) // 3)) if code < 0 else wanted])
        held_out = np.sort(np.concatenate(parts))
        return np.setdiff1d(np.arange(size), held_out), held_out

    def _floor(self) -> float:
        """Noise that stays: about what a kernel density estimate would smooth by."""
        from sklearn.neighbors import NearestNeighbors

        pool = np.unique(self.z[self.random_state.permutation(self.train)[:20_000]], axis=0)
        rows = self.random_state.permutation(pool)[:1000]
        near = NearestNeighbors(n_neighbors=min(2, len(pool))).fit(pool).kneighbors(rows)[0][:, -1]
        return float(np.clip(0.5 * np.median(near) / math.sqrt(self.dim), MIN_FLOOR, MAX_FLOOR))

    # -- models -------------------------------------------------------------------------------------

    def _model(self, flow: Any, *, brief: bool = False) -> VMoNF:
        settings = self.settings
        layers, hidden = settings.num_layers, settings.hidden
        if isinstance(flow, str) and flow in SIZES:
            usual = WIDE_LAYERS if self.dim >= WIDE_FROM else SIZES[flow][0]
            if brief:
                usual = BRIEF_SPLINES
            layers = usual if layers is None else layers
            hidden = SIZES[flow][1] if hidden is None else hidden
        build = Identity if flow == GAUSSIAN else flow
        if build is Identity:
            layers, hidden = None, None
        with own_noise(torch.device("cpu"), seed=self.seed), torch.device("cpu"), _in_float32():
            model = VMoNF(self.num, self.dim, build, num_layers=layers, hidden=hidden)
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

    def trainer(self, flow: Any, *, brief: bool = False) -> MixtureTrainer:
        """That of a model of a flow that can be trained anew, a smaller one if it is for brief training."""
        brief = brief and flow == "neural_spline"
        key = (flow, brief)
        if key not in self._trainers:
            self._trainers[key] = self._trainer(self._model(flow, brief=brief))
        return self._trainers[key]

    def _trainer(
        self, model: VMoNF, *, lr: float | None = None, noise: float | None = None
    ) -> MixtureTrainer:
        settings = self.settings
        return MixtureTrainer(
            model,
            batch_size=settings.batch_size,
            lr=settings.learning_rate if lr is None else lr,
            weight_decay=settings.weight_decay,
            noise=(settings.noise if noise is None else noise, self.floor),
            seed=self.seed,
        )

    def _place(self, model: VMoNF, parts: Labels, train: Labels | None = None) -> None:
        train = self.train if train is None else train
        counted = np.eye(self.num)[parts[train]] * self.counts[train, None]
        values = cluster_gaussians(self.z[train], counted)
        model.place(*(self._tensor(value) for value in values))

    def _tensor(self, value: Array) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.device)

    def _rows(self, index: Labels, parts: Labels) -> TrainingRows:
        code = torch.as_tensor(self.codes[index], device=self.device).unsqueeze(-1)
        allowed = (code < 0) | (code == torch.arange(self.num, device=self.device))
        return TrainingRows(
            self._tensor(self.z[index]),
            allowed,
            torch.as_tensor(parts[index], device=self.device),
            None if (self.counts == 1.0).all() else self._tensor(self.counts[index]),
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

    def scores(self, trainer: MixtureTrainer, start: Start, steps: int, split: Split) -> Array:
        """Minus the log densities of held-out rows, shape ``(M,)``, weighted, after training from a start.

        :param trainer: of a new model, which it trains anew at every call.
        """
        trainer.flat.copy_(trainer.initial)
        self._place(trainer.model, start.parts, split[0])
        self._run(trainer, start, steps, "trying", split)
        return self._held_out_scores(trainer, start, split)

    def _held_out_scores(self, trainer: MixtureTrainer, start: Start, split: Split) -> Array:
        log_prob = trainer.log_prob(self._rows(split[1], start.parts)).cpu().numpy()
        counts = self.counts[split[1]]
        return np.asarray(-log_prob * counts / counts.mean())
