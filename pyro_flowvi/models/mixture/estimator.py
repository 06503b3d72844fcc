"""FlowMixture: a mixture of normalizing flows as a scikit-learn estimator."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..._checks import check_count, check_positive, check_positive_int
from ..._noise import own_noise
from ...flows import check_layer_flow
from ._labels import Targets
from ._partitions import STARTS
from ._printed import MixtureSummary
from ._search import Settings, StartSearch
from .vmonf import VMoNF

__all__ = ["FlowMixture"]

Array = NDArray[np.float64]
CONSTANT_SCALE: Final = 1e-3
"""Standard deviation that the density gives to a column that does not vary."""
ROUNDING: Final = 64 * float(np.finfo(np.float64).eps)
"""A column whose standard deviation is less than so much of its mean is taken to be constant."""
CHUNK: Final = 2**13
"""Rows that are scored at once."""


def _base() -> Any:
    """scikit-learn's base class or, so that this module can be read without it, ``object``."""
    try:
        from sklearn.base import BaseEstimator
    except ImportError:
        return object
    return BaseEstimator


_Base: Any = _base()


class FlowMixture(_Base):
    r"""A mixture of normalizing flows, to be used as ``sklearn.mixture.GaussianMixture`` is.

    Of the four mixtures of flows, :class:`~pyro_flowvi.AutoFlowMixture` is the guide, over the latents of a
    model; :class:`~pyro_flowvi.VMoNF` a Pyro model of rows of data; :class:`~pyro_flowvi.models.FlowMixture`
    the scikit-learn estimator that trains one; and :class:`~pyro_flowvi.distributions.MixtureOfFlows` the
    distribution that all are made of.

    Each component is a flow of its own, so that it can have any shape: :math:`p(x) = \sum_k \pi_k p_k(x)`,
    trained by exact maximum likelihood with the component summed out (:class:`~pyro_flowvi.models.VMoNF`).
    Labels for some rows or all of them are observations of the component.  Needs scikit-learn.

    Columns are standardised: neither the fit nor its start depends on their units.  A mixture needs a start:
    several partitions of the rows (k-means, a Gaussian mixture, spectral clustering, Gaussians whose
    responsibilities agree with their neighbours' and, with labels, label spreading) are trained briefly, on
    up to three splits of the rows, and that with the best likelihood of held-out rows is trained in full,
    with splines and with affine couplings; above 8 columns with affine couplings alone.  Where the likelihood
    cannot tell starts apart, the one that follows neighbours is taken.  Distances are those of standardised
    columns, of which those that tell parts apart count for more; of images, whose pixels have one unit, give
    principal components.

    The base of affine couplings ("realnvp") is a Student distribution with 20 degrees of freedom, of all
    other flows the standard normal.

    With fewer than 50 rows nothing is held out, and k-means (or label spreading) and affine couplings are
    taken.  The number of steps falls in proportion below 512 rows.  A column that is constant is modelled as
    normal around its value, with standard deviation 0.001.  A component to which no row belongs stays, with
    a small weight.

    Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020; for the labels, Izmailov,
    Kirichenko, Finzi and Wilson, *Semi-Supervised Learning with Normalizing Flows*, 2020.

    :param n_components: the number of components; never fewer than there are classes.
    :param flow: a key of :data:`pyro_flowvi.FLOWS`, a callable from the number of columns to a transform, or
        "auto": affine couplings or splines, whichever has the better held-out likelihood.
    :param init: how the partition to start from is found: "kmeans", "gmm", "spectral", "neighbours",
        "label_spreading" (if there is a label for every component), "random", or "auto": the best of all but
        "random", and with a label for every component of "label_spreading" and "neighbours".
    :param n_init: how often each start is tried, with other random numbers.
    :param num_layers: layers of a named flow; by default 6 affine couplings (4 above 4 columns) or 4 splines.
    :param hidden: widths of its networks; by default (16,) or (32, 32).
    :param max_iter: gradient steps of the full training, for 512 rows and more.
    :param batch_size: rows of a step.
    :param learning_rate: Adam's, at the start; it falls along a cosine.
    :param weight_decay: of the weights of networks, decoupled.
    :param noise: standard deviation, in that of the columns, of noise on the rows at the start; it falls to
        half the distance of nearest neighbours over the square root of the number of columns, 0.1 at most.
    :param validation_fraction: the share of rows that are held out.
    :param n_neighbors: of the graphs of spectral clustering, "neighbours" and label spreading.
    :param warm_start: a further ``fit`` continues from the parameters that there are.
    :param random_state: a seed, or a ``numpy.random.RandomState``.
    :param device: of training and of predictions; torch's default if None.
    :param verbose: above 0 shows the progress.

    After ``fit``: ``classes_`` the labels seen, ascending (empty without labels); ``n_components_``;
    ``component_labels_``, what :meth:`predict` returns for each component: its class for the first, and for
    those without a class the integers above the largest class (their index, if classes are no integers);
    ``weights_``; ``model_``, the :class:`VMoNF` of the standardised columns ``(x - mean_) / scale_`` that
    vary, ``varying_``; ``flow_``; ``start_``, the name of the start; ``start_labels_``, its partition of the
    rows, as :meth:`predict` would return it; ``starts_``, what was tried, with each one's held-out negative
    log likelihood in the units of the data (of one start alone, that of the full training) and, where that is
    infinite, the ``reason``; ``held_out_nll_`` (infinite if no rows were held out);
    ``loss_curve_``; ``n_iter_``; ``converged_``, False if training stopped at values that are not finite, at
    the best parameters before those; ``n_features_in_``, ``feature_names_in_``.

    Example::

        >>> x = np.concatenate([np.random.randn(60, 2) - 4, np.random.randn(60, 2) + 4])
        >>> mixture = FlowMixture(2, flow="realnvp", init="kmeans", max_iter=40, random_state=0).fit(x)
        >>> sorted(np.bincount(mixture.predict(x)).tolist()), mixture.score_samples(x).shape
        ([60, 60], (120,))
        >>> labels = np.where(np.arange(120) % 60 == 0, np.arange(120) // 60 + 7, -1)
        >>> mixture.fit(x, labels).predict(x[[1, 61]]).tolist()
        [7, 8]
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        flow: str | Callable[[int], Any] = "auto",
        init: str = "auto",
        n_init: int = 1,
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        max_iter: int = 1500,
        batch_size: int = 256,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.05,
        noise: float = 0.15,
        validation_fraction: float = 0.1,
        n_neighbors: int = 10,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = None,
        verbose: int = 0,
    ) -> None:
        if _Base is object:
            raise ImportError("FlowMixture needs scikit-learn: pip install pyro-flowvi[sklearn]")
        self.n_components = n_components
        self.flow = flow
        self.init = init
        self.n_init = n_init
        self.num_layers = num_layers
        self.hidden = hidden
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.noise = noise
        self.validation_fraction = validation_fraction
        self.n_neighbors = n_neighbors
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.estimator_type = "density_estimator"
        return tags

    # -- fitting ------------------------------------------------------------------------------------

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:  # noqa: N803
        """Fits the mixture.

        :param X: finite values, shape ``(N, D)``.
        :param y: labels, shape ``(N,)``: integers, of which -1 is a row without one, or anything that can be
            sorted in an array of objects with -1 likewise.  Labels that are all -1 are none.
        :return: the estimator.
        :raises ValueError: if an argument is not of the described kind, a parameter is not, there are fewer
            rows than components, or no column varies.
        """
        from sklearn.utils import check_random_state

        settings = self._settings()
        x = self._validated(X, reset=True)
        targets = Targets.of(y, len(x))
        num = max(check_positive_int("n_components", self.n_components), len(targets.classes))
        if len(x) < num:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {num}, n_samples = {len(x)}"
            )
        before = self._to_continue(num, targets) if self.warm_start else None
        if before is None:
            self._scale_by(x)
        random_state = check_random_state(self.random_state)
        search = StartSearch(
            self._standardised(x), targets.codes, num, settings, random_state, self._device()
        )
        found = search.continued(before, self.flow_) if before is not None else search.best()
        self.classes_ = targets.classes
        self.n_components_ = num
        self.component_labels_ = targets.component_labels(num)
        self._keep(found, search.offset(self.scale_[self.varying_]))
        return self

    def _keep(self, found: Any, offset: float) -> None:
        offset -= float(self._constant_log_prob(self.mean_[None])[0])
        self.model_: VMoNF = found.model
        self.flow_ = found.start.flow
        self.start_ = found.start.name
        self.start_labels_ = self.component_labels_[found.start.parts]
        self.starts_ = [
            {"init": each.name, "flow": each.flow, "held_out_nll": each.nll + offset}
            | ({"reason": each.reason} if each.reason else {})
            for each in found.tried
        ]
        self.held_out_nll_ = found.nll + offset
        self.loss_curve_ = found.losses
        self.n_iter_ = len(found.losses)
        self.converged_ = not found.diverged
        with torch.no_grad():
            self.weights_: Array = self.model_.mixture().weights.cpu().numpy()
        if found.diverged:
            from sklearn.exceptions import ConvergenceWarning

            warnings.warn(
                f"training met values that are not finite at step {self.n_iter_}; the best parameters before "
                "are kept. Try a lower learning_rate, or more noise",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _settings(self) -> Settings:
        check_layer_flow("realnvp" if self.flow == "auto" else self.flow, self.hidden)
        if self.init != "auto" and self.init not in STARTS:
            raise ValueError(f"init: expected one of {['auto', *STARTS]}, got {self.init!r}")
        fraction = check_positive("validation_fraction", self.validation_fraction)
        if fraction >= 1.0:
            raise ValueError(f"validation_fraction: expected a number below 1, got {fraction!r}")
        for name in ("noise", "weight_decay"):
            if getattr(self, name) != 0:
                check_positive(name, getattr(self, name))
        return Settings(
            flow=self.flow,
            init=self.init,
            n_init=check_positive_int("n_init", self.n_init),
            num_layers=self.num_layers,
            hidden=self.hidden,
            max_iter=check_positive_int("max_iter", self.max_iter),
            batch_size=check_positive_int("batch_size", self.batch_size),
            learning_rate=check_positive("learning_rate", self.learning_rate),
            weight_decay=float(self.weight_decay),
            noise=float(self.noise),
            validation_fraction=fraction,
            n_neighbors=check_positive_int("n_neighbors", self.n_neighbors),
            verbose=check_count("verbose", int(self.verbose)),
        )

    def _device(self) -> torch.device:
        return torch.get_default_device() if self.device is None else torch.device(self.device)

    def _to_continue(self, num: int, targets: Targets) -> VMoNF | None:
        """A copy of the model of the last fit, if there was one."""
        if not hasattr(self, "model_"):
            return None
        same = num == self.n_components_ and int(self.varying_.sum()) == self.model_.dim
        if not same or len(self.mean_) != self.n_features_in_ or not targets.match(self.classes_):
            raise ValueError(
                "warm_start: expected the columns, components and classes of the last fit, got others"
            )
        targets.classes = self.classes_
        return copy.deepcopy(self.model_)

    # -- data ---------------------------------------------------------------------------------------

    def _validated(self, X: ArrayLike, *, reset: bool) -> Array:  # noqa: N803
        options = {"dtype": np.float64, "ensure_min_samples": 2 if reset else 1, "reset": reset}
        try:
            from sklearn.utils.validation import validate_data
        except ImportError:  # scikit-learn before 1.6
            return self._validate_data(X, **options)  # type: ignore[no-any-return]
        return validate_data(self, X, **options)  # type: ignore[no-any-return]

    def _scale_by(self, x: Array) -> None:
        # From the middle and in parts of the range, whose squares neither overflow nor vanish.
        low, high = x.min(0), x.max(0)
        middle, half = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        u = (x - middle) / np.where(half > 0, half, 1.0)
        self.mean_: Array = middle + half * u.mean(0)
        self.scale_: Array = half * u.std(0)
        self.varying_ = self.scale_ > ROUNDING * np.abs(self.mean_)
        if not self.varying_.any():
            raise ValueError("X: expected a column that varies, got constant ones alone")
        self.scale_[~self.varying_] = CONSTANT_SCALE

    def _standardised(self, x: Array) -> Array:
        return ((x - self.mean_) / self.scale_)[:, self.varying_]

    def _constant_log_prob(self, x: Array) -> Array:
        """Log density of the columns that are constant."""
        z = ((x - self.mean_) / self.scale_)[:, ~self.varying_]
        constant = np.log(CONSTANT_SCALE * np.sqrt(2.0 * np.pi))
        return np.asarray(-0.5 * (z**2).sum(1) - z.shape[1] * constant)

    @torch.no_grad()
    def _joint_log_prob(self, X: ArrayLike) -> Array:  # noqa: N803
        """log π_k + log p(x | k) in the units of the data, shape ``(N, K)``."""
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        x = self._validated(X, reset=False)
        like: Tensor = self.model_.weights.logits
        z = torch.as_tensor(self._standardised(x)).to(like)
        parts = [self.model_.joint_log_prob(rows).double().cpu().numpy() for rows in z.split(CHUNK)]
        shift = self._constant_log_prob(x) - np.log(self.scale_[self.varying_]).sum()
        return np.asarray(np.concatenate(parts) + shift[:, None])

    # -- what was learnt ----------------------------------------------------------------------------

    def summary(self) -> MixtureSummary:
        """What the fit has found: flow, start, steps, held-out likelihood, labels and weights of components,
        and the starts that were tried.  It prints as lines, and in a notebook as tables; the estimator itself
        prints its parameters, as all of scikit-learn's do.

        :raises NotFittedError: before ``fit``.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        return MixtureSummary.of(self)

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The most probable component of each row, as ``component_labels_`` has it, shape ``(N,)``."""
        indices = self._joint_log_prob(X).argmax(1)
        return np.asarray(self.component_labels_[indices])

    def fit_predict(self, X: ArrayLike, y: ArrayLike | None = None) -> NDArray[Any]:  # noqa: N803
        """As :meth:`fit` and then :meth:`predict`."""
        return self.fit(X, y).predict(X)

    def predict_proba(self, X: ArrayLike) -> Array:  # noqa: N803
        """The probabilities p(k | x) of the components, shape ``(N, K)``."""
        joint = self._joint_log_prob(X)
        likely = np.exp(joint - joint.max(1, keepdims=True))
        return np.asarray(likely / likely.sum(1, keepdims=True))

    def score_samples(self, X: ArrayLike) -> Array:  # noqa: N803
        """The log density of each row, shape ``(N,)``."""
        joint = self._joint_log_prob(X)
        top = joint.max(1)
        return np.asarray(top + np.log(np.exp(joint - top[:, None]).sum(1)))

    def score(self, X: ArrayLike, y: ArrayLike | None = None) -> float:  # noqa: N803
        """The mean log density of the rows; ``y`` is not looked at."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[Array, NDArray[Any]]:
        """Draws, and the component of each as :meth:`predict` would name it.

        :return: shapes ``(n_samples, D)`` and ``(n_samples,)``.
        :raises ValueError: if ``n_samples`` is not a positive integer.
        """
        from sklearn.utils import check_random_state
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        num = check_positive_int("n_samples", n_samples)
        random_state = check_random_state(self.random_state)
        device = self.model_.weights.logits.device
        with own_noise(device, seed=int(random_state.randint(2**31 - 1))), torch.no_grad():
            z, component = self.model_.mixture().rsample_with_component((num,))
        x = random_state.standard_normal((num, len(self.mean_)))
        x[:, self.varying_] = z.cpu().numpy()
        return x * self.scale_ + self.mean_, self.component_labels_[component.cpu().numpy()]

    def _num_parameters(self) -> int:
        """Free ones: of the triangular factors the lower halves, of the weights all but one."""
        dim, num = self.model_.dim, self.n_components_
        total = sum(param.numel() for param in self.model_.parameters())
        return total - 1 - (num * dim * (dim + 1) // 2 if dim > 1 else 0)

    def bic(self, X: ArrayLike) -> float:  # noqa: N803
        """The Bayesian information criterion, -2 log L + p log N; lower is better.

        Flows have many parameters that hardly matter, for which it charges in full.
        """
        scores = self.score_samples(X)
        return float(-2.0 * scores.sum() + self._num_parameters() * np.log(len(scores)))

    def aic(self, X: ArrayLike) -> float:  # noqa: N803
        """Akaike's information criterion, -2 log L + 2 p; lower is better."""
        return float(-2.0 * self.score_samples(X).sum() + 2.0 * self._num_parameters())
