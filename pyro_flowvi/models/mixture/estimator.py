"""FlowMixture: a mixture of normalizing flows as a scikit-learn estimator."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..._checks import check_count, check_positive, check_positive_int
from ...flows import check_layer_flow
from ._columns import Columns, Rows, counts_of
from ._counting import Counting, count_components
from ._fitted import FittedMixture
from ._labels import Targets
from ._partitions import STARTS
from ._search import SearchResult, StartSearch
from ._trials import GAUSSIAN, Settings, Start
from .vmonf import VMoNF

__all__ = ["FlowMixture"]

Array = NDArray[np.float64]


class FlowMixture(FittedMixture):
    r"""A mixture of normalizing flows, to be used as ``sklearn.mixture.GaussianMixture`` is.

    Of the four mixtures of flows, :class:`~pyro_flowvi.AutoFlowMixture` is the guide, over the latents of a
    model; :class:`~pyro_flowvi.VMoNF` a Pyro model of rows of data; :class:`~pyro_flowvi.models.FlowMixture`
    the scikit-learn estimator that trains one; and :class:`~pyro_flowvi.distributions.MixtureOfFlows` the
    distribution that all are made of.

    Each component is a flow of its own, so that it can have any shape: :math:`p(x) = \sum_k \pi_k p_k(x)`,
    trained by exact maximum likelihood with the component summed out (:class:`~pyro_flowvi.models.VMoNF`).
    Labels for some rows or all of them are observations of the component.  Needs scikit-learn.

    Columns are standardised: neither the fit nor its start depends on their units, nor on the order of the
    rows.  A mixture needs a start: several partitions of the rows (k-means, a Gaussian mixture, spectral
    clustering, Gaussians whose responsibilities agree with their neighbours' and, with labels, label
    spreading) are trained briefly, on up to two splits of the rows, and that with the best likelihood of
    held-out rows is trained in full, as Gaussians, with affine couplings and with splines (above 8 columns
    without splines), of which the best is kept.  Where the likelihood cannot tell starts apart, the one that
    follows neighbours is taken.  Distances are those of standardised columns, of which those that tell parts
    apart count for more; of images, whose pixels have one unit, give principal components.

    ``n_components="auto"`` counts: mixtures of 1, 2, ... Gaussians and affine coupling flows are trained on
    three folds of the rows, and the fewest components, 25 at most, are taken that are not clearly worse in
    held-out likelihood than up to three more.  A closed curve, which takes several of these, is one component
    if its rows are connected and splines describe it as well as one.  It takes some times as long as a fit.
    Parts that overlap so much that the density between them hardly falls are one.

    A step of training runs each component on rows of its own, drawn by their responsibilities, so that more
    components hardly cost more.  For data that do not fit in memory there is :meth:`partial_fit`.

    The base of affine couplings ("realnvp") is a Student distribution with 20 degrees of freedom, of all
    other flows the standard normal.

    With fewer than 50 rows nothing is held out or counted, and k-means (or label spreading) and affine
    couplings are taken.  The number of steps falls in proportion below 512 rows.  A column that is constant
    is modelled as normal around its value, with standard deviation 0.001.  A component to which no row
    belongs stays, with a small weight.

    Answers are in the dtype of the data, float32 or float64; training is in float32, scores in float64.

    Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020; for the labels, Izmailov,
    Kirichenko, Finzi and Wilson, *Semi-Supervised Learning with Normalizing Flows*, 2020; for the training,
    Neal and Hinton, *A View of the EM Algorithm that Justifies Incremental, Sparse, and Other
    Variants*, 1998.

    :param n_components: the number of components, never fewer than there are classes; or "auto".
    :param flow: a key of :data:`pyro_flowvi.FLOWS`, a callable from the number of columns to a transform,
        "gaussian", or "auto": Gaussians, affine couplings or splines, whichever has the best held-out
        likelihood.
    :param init: how the partition to start from is found: "kmeans", "gmm", "spectral", "neighbours",
        "label_spreading" (if there is a label for every component), "random", or "auto": the best of all but
        "random", and with a label for every component of "label_spreading" and "neighbours".
    :param n_init: how often each start is tried, with other random numbers.
    :param num_layers: layers of a named flow; by default 6 affine couplings (4 above 4 columns) or 4 splines.
    :param hidden: widths of its networks; by default (16,) or (32, 32).
    :param max_iter: gradient steps of the full training, for 512 to 20,000 rows; above, up to twice as many.
    :param batch_size: rows of a step, shared among the components.
    :param learning_rate: Adam's, at the start; it falls along a cosine.
    :param weight_decay: of the weights of networks, decoupled.
    :param noise: standard deviation, in that of the columns, of noise on the rows at the start; it falls to
        half the distance of nearest neighbours over the square root of the number of columns, 0.1 at most.
    :param validation_fraction: the share of rows that are held out; 4,000 rows at most.
    :param n_neighbors: of the graphs of spectral clustering, "neighbours" and label spreading.
    :param warm_start: a further ``fit`` continues from the parameters that there are.
    :param random_state: a seed, or a ``numpy.random.RandomState``.
    :param device: of training and of predictions; torch's default if None.
    :param verbose: above 0 shows the progress.

    After ``fit``: ``classes_`` the labels seen, ascending (empty without labels); ``n_components_``;
    ``component_labels_``, what :meth:`predict` returns for each component: its class for the first, and for
    those without a class the integers above the largest class (their index, if classes are no integers);
    ``weights_``; ``means_`` and ``covariances_`` of the components, by draws, with their standard errors
    ``means_se_`` and ``covariances_se_``; ``model_``, the :class:`VMoNF` of the standardised columns
    ``(x - mean_) / scale_`` that vary, ``varying_``; ``flow_``; ``start_``, the name of the start;
    ``start_labels_``, its partition of the rows, as :meth:`predict` would return it; ``starts_``, what was
    tried, with each one's held-out negative log likelihood in the units of the data (of one start alone,
    that of the full training) and, where that is infinite, the ``reason``; ``counting_``, of "auto" the
    held-out negative log likelihood of each number of components that was tried; ``held_out_nll_`` (infinite
    if no rows were held out); ``loss_curve_``; ``n_iter_``; ``converged_``, False if training stopped at
    values that are not finite, at the best parameters before those; ``rows_seen_``; ``n_features_in_``,
    ``feature_names_in_``.

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
        n_components: int | Literal["auto"] = 1,
        *,
        flow: str | Callable[[int], Any] = "auto",
        init: str = "auto",
        n_init: int = 1,
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        max_iter: int = 800,
        batch_size: int = 512,
        learning_rate: float = 8e-3,
        weight_decay: float = 0.05,
        noise: float = 0.15,
        validation_fraction: float = 0.1,
        n_neighbors: int = 10,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = None,
        verbose: int = 0,
    ) -> None:
        if FittedMixture.__base__ is object:
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

    def fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Fits the mixture.

        :param X: finite values, shape ``(N, D)``.
        :param y: labels, shape ``(N,)``: integers, of which -1 is a row without one, or anything that can be
            sorted in an array of objects with -1 likewise.  Labels that are all -1 are none.
        :param sample_weight: what each row counts, shape ``(N,)``: weights that are all integers are numbers
            of like rows, of others the scale is not looked at.
        :return: the estimator.
        :raises ValueError: if an argument is not of the described kind, a parameter is not, there are fewer
            rows than components, or no column varies.
        """
        return self._fit(X, y, sample_weight)

    def _fit(self, X: ArrayLike, y: Any, sample_weight: Any, classes: Any = None) -> Self:  # noqa: N803
        settings = self._settings()
        x = self._validated(X, reset=True)
        targets = Targets.of(y, len(x))
        if classes is not None:
            targets.take_classes(Targets.of(classes, len(np.atleast_1d(classes))).classes)
        counts = counts_of(sample_weight, x)
        counted = int(np.count_nonzero(counts))
        least = len(targets.classes)
        if self.n_components != "auto":
            least = max(check_positive_int("n_components", self.n_components), least)
        num = max(least, 1)
        if counted < num:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {num}, n_samples = {counted}"
            )
        going_on = self.warm_start and hasattr(self, "model_")
        if going_on and self.n_components == "auto":  # that of the last fit
            num = self.n_components_
        before = self._to_continue(num, targets) if going_on else None
        columns = Columns.of(x.astype(np.float64), counts) if before is None else self._columns
        rows = Rows.of(x.astype(np.float64), targets.codes, counts, columns)
        random_state, counting = self._random_state(), Counting(num)
        if self.n_components == "auto" and before is None:
            counting = count_components(rows, num, settings, random_state, self._device())
        num = counting.num
        search = StartSearch(rows, num, settings, random_state, self._device())
        if counting.parts is not None:
            search.further = [Start("connected", None, counting.parts)]
        found = search.continued(before, self.flow_) if before is not None else search.best()
        self.mean_, self.scale_, self.varying_ = columns.mean, columns.scale, columns.varying
        self.classes_ = targets.classes
        self.n_components_ = num
        self.component_labels_ = targets.component_labels(num)
        self.counting_ = {k: nll + columns.log_scale for k, nll in counting.nlls.items()}
        self._dtype = x.dtype
        self._keep(found, x, rows)
        self.rows_seen_ = float(counts.sum())
        return self

    def partial_fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        classes: ArrayLike | None = None,
    ) -> Self:
        """Goes on with more rows, for data that do not fit in memory.

        The first rows are fitted as by :meth:`fit`: the start, the flow and the units are theirs, so they
        should be a fair sample of all, some thousand rows or more.  What follows is trained on in a few
        passes, and counts in proportion to the rows that there have been.  ``held_out_nll_`` is then that of
        the new rows before they were trained on.

        :param X: as of :meth:`fit`, as ``y`` and ``sample_weight``.
        :param classes: all labels that there will be, if the first rows do not have all of them.
        :return: the estimator.
        :raises ValueError: as :meth:`fit`, and for a label or columns that the first rows did not have.
        """
        if not hasattr(self, "rows_seen_"):
            return self._fit(X, y, sample_weight, classes)
        settings = self._settings()
        x = self._validated(X, reset=False)
        targets = Targets.of(y, len(x))
        model = self._to_continue(self.n_components_, targets)
        counts = counts_of(sample_weight, x)
        rows = Rows.of(x.astype(np.float64), targets.codes, counts, self._columns)
        search = StartSearch(rows, self.n_components_, settings, self._random_state(), self._device())
        self.rows_seen_ += float(counts.sum())
        self._keep(search.more_rows(model, self.flow_, float(counts.sum()) / self.rows_seen_), x, rows)
        return self

    def _random_state(self) -> Any:
        from sklearn.utils import check_random_state

        return check_random_state(self.random_state)

    def fit_predict(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """As :meth:`fit` and then :meth:`predict`."""
        return self.fit(X, y, sample_weight).predict(X)

    def _keep(self, found: SearchResult, x: Array, rows: Rows) -> None:
        columns = self._columns
        offset = columns.log_scale - float(columns.constant_log_prob(columns.mean[None])[0])
        self.model_: VMoNF = found.model
        self.flow_ = found.start.flow
        self.start_ = found.start.name
        self.starts_ = [
            {"init": each.name, "flow": each.flow, "held_out_nll": each.nll + offset}
            | ({"reason": each.reason} if each.reason else {})
            for each in found.tried
        ]
        self.held_out_nll_ = found.nll + offset
        self.loss_curve_ = found.losses
        self.n_iter_ = len(found.losses)
        self.converged_ = not found.diverged
        self._moments = None
        parts = np.empty(len(x), dtype=np.int64)
        parts[rows.place] = found.start.parts
        if len(rows.place) < len(x):
            left = np.setdiff1d(np.arange(len(x)), rows.place)
            parts[left] = self._joint_log_prob(x[left]).argmax(1)
        self.start_labels_ = self.component_labels_[parts]
        with torch.no_grad():
            self.weights_ = self.model_.mixture().weights.cpu().numpy().astype(self._dtype)
        if found.diverged:
            from sklearn.exceptions import ConvergenceWarning

            warnings.warn(
                f"training met values that are not finite at step {self.n_iter_}; the best parameters before "
                "are kept. Try a lower learning_rate, or more noise",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _settings(self) -> Settings:
        named = isinstance(self.flow, str) and self.flow in ("auto", GAUSSIAN)
        check_layer_flow("realnvp" if named else self.flow, self.hidden)
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

    def _to_continue(self, num: int, targets: Targets) -> VMoNF:
        """A copy of the model of the last fit."""
        same = num == self.n_components_ and int(self.varying_.sum()) == self.model_.dim
        if not same or len(self.mean_) != self.n_features_in_:
            raise ValueError("warm_start: expected the columns and components of the last fit, got others")
        targets.take_classes(self.classes_)
        return copy.deepcopy(self.model_)
