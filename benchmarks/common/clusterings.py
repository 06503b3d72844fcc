"""What benchmarks of clusterings share: scores, scikit-learn's estimators, and images of components."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.semi_supervised import LabelSpreading

from benchmarks.common.results import Row
from pyro_flowvi.models import FlowMixture
from pyro_flowvi.models.mixture._partitions import cluster_gaussians

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
ALPHAS = (0.2, 0.99)
"""Of label spreading: scikit-learn's default, and that for classes along curves."""


def matched_accuracy(y: Labels, clusters: Labels) -> float:
    """The share that is right under the best one-to-one matching of clusters and classes."""
    counts = np.zeros((y.max() + 1, int(clusters.max()) + 1))
    np.add.at(counts, (y, clusters), 1.0)
    return float(counts[linear_sum_assignment(-counts)].sum() / len(y))


def gaussian_from(z: Array, parts: Labels, num: int, seed: int) -> GaussianMixture:
    """EM from a partition."""
    loc, factors, weights = cluster_gaussians(z, np.eye(num)[parts])
    precisions = np.linalg.inv(factors @ factors.swapaxes(-1, -2))
    start: Row = {"means_init": loc, "precisions_init": precisions, "weights_init": weights}
    return GaussianMixture(num, random_state=seed, max_iter=500, **start).fit(z)


def peers(num: int, seed: int) -> dict[str, Any]:
    """scikit-learn's clusterings and mixtures, with ten restarts each."""
    options: Row = {"random_state": seed, "n_init": 10, "max_iter": 500}
    return {
        "KMeans": KMeans(num, n_init=10, random_state=seed),
        "GaussianMixture": GaussianMixture(num, **options),
        "BayesianGaussianMixture": BayesianGaussianMixture(n_components=num, **options),
    }


def spreadings() -> dict[str, LabelSpreading]:
    """Label spreading over the graph of ten neighbours."""
    options: Row = {"kernel": "knn", "n_neighbors": 10, "max_iter": 1000}
    return {f"LabelSpreading, alpha {alpha}": LabelSpreading(alpha=alpha, **options) for alpha in ALPHAS}


def component_images(flows: FlowMixture, pca: Any, each: int, side: int) -> Array:
    """Draws of each component as images, those of one after those of another: shape ``(K * each, S, S)``.

    :param flows: fitted to the principal components of images with values from 0 to 1.
    :param pca: that made these from the pixels.
    :param each: draws of a component.
    :param side: the length S of a side.
    """
    with torch.no_grad():
        drawn = flows.model_.mixture().rsample_components((each,)).cpu().numpy()
    flat = (drawn * flows.scale_ + flows.mean_).swapaxes(0, 1).reshape(-1, drawn.shape[-1])
    images: Array = pca.inverse_transform(flat).reshape(-1, side, side).clip(0.0, 1.0)
    return images
