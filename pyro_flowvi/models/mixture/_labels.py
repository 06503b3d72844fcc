"""Labels as users have them, and the components that they stand for."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Targets"]

UNLABELLED = -1


@dataclass
class Targets:
    """Labels of rows as numbers of classes.

    :param classes: the classes, ascending.
    :param codes: the index of the class of each row, or -1, shape ``(N,)``.

    Example::

        >>> targets = Targets.of([7, -1, 3], 3)
        >>> targets.classes.tolist(), targets.codes.tolist(), targets.component_labels(4).tolist()
        ([3, 7], [1, -1, 0], [3, 7, 8, 9])
    """

    classes: NDArray[Any]
    codes: NDArray[np.int64]

    @classmethod
    def of(cls, y: ArrayLike | None, size: int) -> Self:
        """The labels of ``size`` rows.

        :param y: integers (also as floats or booleans), strings, or objects; -1 is a row without a label.
        :raises ValueError: if they are none of these, or of another number.
        """
        if y is None:
            return cls(np.empty(0, dtype=np.int64), np.full(size, UNLABELLED))
        from sklearn.utils import column_or_1d

        labels: NDArray[Any] = column_or_1d(y, warn=True)
        if len(labels) != size:
            raise ValueError(f"y: expected {size} labels, one for each row of X, got {len(labels)}")
        if labels.dtype.kind == "O":
            missing = np.array([_is_unlabelled(label) for label in labels])
            if all(_is_number(label) for label in labels):
                labels = _integers(np.array([float(label) for label in labels]))
        elif labels.dtype.kind in "US":
            if (labels == str(UNLABELLED)).any():
                raise ValueError("y: expected an array of objects to mix strings and -1, got one of strings")
            missing = np.zeros(size, dtype=bool)
        else:
            labels = _integers(labels)
            missing = labels == UNLABELLED
        codes = np.full(size, UNLABELLED)
        try:
            classes, codes[~missing] = np.unique(labels[~missing], return_inverse=True)
        except TypeError:
            raise ValueError("y: expected labels that can be sorted, got objects that cannot") from None
        return cls(classes, codes)

    def take_classes(self, classes: NDArray[Any]) -> None:
        """Numbers the labels as these classes.

        :raises ValueError: if there are others.
        """
        others = sorted(set(self.classes.tolist()) - set(classes.tolist()))
        if others:
            raise ValueError(f"y: expected labels among the classes {classes.tolist()}, got {others}")
        if len(self.classes):
            place = np.searchsorted(classes, self.classes)
            self.codes = np.where(self.codes >= 0, place[self.codes], UNLABELLED)
        self.classes = classes

    def component_labels(self, num: int) -> NDArray[Any]:
        """What the first ``num`` components are called: classes, and above them integers that are none."""
        rest = num - len(self.classes)
        if self.classes.dtype.kind in "iu":
            start = max(int(self.classes.max(initial=-1)), -1) + 1
            return np.concatenate([self.classes, np.arange(start, start + rest, dtype=np.int64)])
        if rest == 0:
            return self.classes
        names = np.empty(num, dtype=object)
        names[: num - rest] = self.classes
        names[num - rest :] = range(num - rest, num)
        return names


def _is_number(label: object) -> bool:
    return isinstance(label, (int, float, np.integer, np.floating))


def _is_unlabelled(label: object) -> bool:
    return _is_number(label) and label == UNLABELLED


def _integers(labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"y: expected integers, or -1 for a row without a label, got {labels.dtype}")
    whole = labels.dtype.kind != "f" or np.isfinite(labels) & (labels == np.floor(labels))
    if not np.all(whole):
        wrong = labels[~np.asarray(whole)][0]
        raise ValueError(f"y: expected integers, or -1 for a row without a label, got {wrong!r}")
    return labels.astype(np.int64)
