"""How well clusters match classes."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def accuracy(y, clusters):
    """The share of rows that is right under the best one-to-one matching."""
    counts = np.zeros((y.max() + 1, clusters.max() + 1))
    np.add.at(counts, (y, clusters), 1)
    return counts[linear_sum_assignment(-counts)].sum() / len(y)
