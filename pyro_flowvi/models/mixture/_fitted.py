"""What a fitted mixture of flows answers, in the units of the data: predictions, density, draws, moments."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..._checks import check_positive_int
from ..._noise import own_noise
from ._columns import Columns, counts_of
from ._moments import Moments, component_moments
from ._printed import MixtureSummary
from ._training import CHUNK
from .vmonf import VMoNF

__all__ = ["FittedMixture"]

Array = NDArray[Any]


def _base() -> Any:
    """scikit-learn's base class or, so that this module can be read without it, ``object``."""
    try:
        from sklearn.base import BaseEstimator
    except ImportError:
        return object
    return BaseEstimator


_Base: Any = _base()


class FittedMixture(_Base):
    """The answers of :class:`~pyro_flowvi.models.FlowMixture`, from what its ``fit`` has left."""

    model_: VMoNF
    n_components_: int
    component_labels_: NDArray[Any]
    mean_: Array
    scale_: Array
    varying_: NDArray[np.bool_]
    _dtype: Any
    _moments: Moments | None

    # -- data ---------------------------------------------------------------------------------------

    def _validated(self, X: ArrayLike, *, reset: bool) -> Array:  # noqa: N803
        options = {
            "dtype": (np.float64, np.float32),
            "ensure_min_samples": 2 if reset else 1,
            "reset": reset,
        }
        try:
            from sklearn.utils.validation import validate_data
        except ImportError:  # scikit-learn before 1.6
            return self._validate_data(X, **options)  # type: ignore[no-any-return]
        return validate_data(self, X, **options)  # type: ignore[no-any-return]

    def _new_rows(self, X: ArrayLike) -> Array:  # noqa: N803
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        return self._validated(X, reset=False)

    @property
    def _columns(self) -> Columns:
        return Columns(self.mean_, self.scale_, self.varying_)

    @torch.no_grad()
    def _joint_log_prob(self, x: Array) -> NDArray[np.float64]:
        """log π_k + log p(x | k) in the units of the data, shape ``(N, K)``."""
        columns, like = self._columns, self.model_.weights.logits
        parts = []
        for start in range(0, len(x), CHUNK):
            rows = x[start : start + CHUNK].astype(np.float64)
            z: Tensor = torch.as_tensor(columns.standardised(rows)).to(like)
            shift = columns.constant_log_prob(rows) - columns.log_scale
            parts.append(self.model_.joint_log_prob(z).double().cpu().numpy() + shift[:, None])
        return np.concatenate(parts)

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

    def _found_moments(self) -> Moments:
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self, "model_")
        if self._moments is None:
            found = component_moments(self.model_).with_constants(self.varying_)
            self._moments = found.scaled(self.mean_, self.scale_)
        return self._moments

    @property
    def means_(self) -> Array:
        """The means of the components, by 20,000 draws of each, shape ``(K, D)``."""
        return self._found_moments().means.astype(self._dtype)

    @property
    def means_se_(self) -> Array:
        """Standard errors of :attr:`means_` by the number of draws, shape ``(K, D)``."""
        return self._found_moments().means_se.astype(self._dtype)

    @property
    def covariances_(self) -> Array:
        """The covariances of the components, by the same draws, shape ``(K, D, D)``."""
        return self._found_moments().covariances.astype(self._dtype)

    @property
    def covariances_se_(self) -> Array:
        """Standard errors of :attr:`covariances_` by the number of draws, shape ``(K, D, D)``."""
        return self._found_moments().covariances_se.astype(self._dtype)

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The most probable component of each row, as ``component_labels_`` has it, shape ``(N,)``."""
        indices = self._joint_log_prob(self._new_rows(X)).argmax(1)
        return np.asarray(self.component_labels_[indices])

    def predict_proba(self, X: ArrayLike) -> Array:  # noqa: N803
        """The probabilities p(k | x) of the components, shape ``(N, K)``."""
        x = self._new_rows(X)
        joint = self._joint_log_prob(x)
        likely = np.exp(joint - joint.max(1, keepdims=True))
        return np.asarray(likely / likely.sum(1, keepdims=True), dtype=x.dtype)

    def score_samples(self, X: ArrayLike) -> Array:  # noqa: N803
        """The log density of each row, shape ``(N,)``."""
        x = self._new_rows(X)
        return self._log_prob(x).astype(x.dtype)

    def _log_prob(self, x: Array) -> NDArray[np.float64]:
        joint = self._joint_log_prob(x)
        top = joint.max(1)
        return np.asarray(top + np.log(np.exp(joint - top[:, None]).sum(1)))

    def score(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> float:
        """The mean log density of the rows; ``y`` is not looked at.

        :param sample_weight: what each row counts, shape ``(N,)``.
        """
        x = self._new_rows(X)
        return float(np.average(self._log_prob(x), weights=counts_of(sample_weight, x)))

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
        x = x * self.scale_ + self.mean_
        return x.astype(self._dtype), self.component_labels_[component.cpu().numpy()]

    def _num_parameters(self) -> int:
        """Free ones: of the triangular factors the lower halves, of the weights all but one."""
        dim, num = self.model_.dim, self.model_.num_components
        total = sum(param.numel() for param in self.model_.parameters())
        return total - 1 - (num * dim * (dim + 1) // 2 if dim > 1 else 0)

    def bic(self, X: ArrayLike) -> float:  # noqa: N803
        """The Bayesian information criterion, -2 log L + p log N; lower is better.

        Flows have many parameters that hardly matter, for which it charges in full.
        """
        scores = self._log_prob(self._new_rows(X))
        return float(-2.0 * scores.sum() + self._num_parameters() * np.log(len(scores)))

    def aic(self, X: ArrayLike) -> float:  # noqa: N803
        """Akaike's information criterion, -2 log L + 2 p; lower is better."""
        scores = self._log_prob(self._new_rows(X))
        return float(-2.0 * scores.sum() + 2.0 * self._num_parameters())
