"""Minibatches and binary images."""

from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..._checks import check_positive_int

__all__ = ["Minibatches", "binarize"]


def _draw_seed(*key: int) -> int:
    """A seed of torch's generators from several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed: expected an integer that is not negative, got {seed!r}")
    return int(seed)


def _check_means(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else repr(images)
        raise ValueError(f"images: expected a floating-point tensor of shape (N, ...), got {got}")
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN fails as well
        raise ValueError(f"images: expected means from 0 to 1, got values from {low} to {high}")
    return images


def _bernoulli(means: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # In float32 whatever the images are, so that a seed binarises alike in every dtype.
    noise = torch.rand(means.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (noise.to(means.device) < means).to(means.dtype)


def binarize(images: Tensor, seed: int = 0) -> Tensor:
    """One draw of zeros and ones, with the pixels as their means; the same for the same seed.

    :param images: means from 0 to 1, floating point, shape ``(N, ...)``.
    :param seed: of the draw, apart from torch's own generator.
    :raises ValueError: if ``images`` is not of the described kind.

    Example::

        >>> binarize(torch.tensor([[0.0, 0.5, 1.0]]).expand(1000, 3)).mean(0).round(decimals=1)
        tensor([0.0000, 0.5000, 1.0000])
    """
    return _bernoulli(_check_means(images), _draw_seed(_check_seed(seed)))


class Minibatches:
    """Minibatches in shuffled epochs as a function of the step, for ``fit(..., batches=...)``.

    A batch depends on the seed and the step alone, so that a run that is resumed sees the same ones.  What
    does not fill a batch at the end of an epoch is left out of it.

    :param images: shape ``(N, ...)``; to binarise, means from 0 to 1.
    :param batch_size: images in a batch.
    :param binarize: whether pixels are drawn anew as zeros and ones each time (dynamic binarisation).
    :param seed: of order and draws, apart from torch's own generator.
    :raises ValueError: if an argument is not of the described kind, or there is less than one batch.

    Example::

        >>> batches = Minibatches(torch.full((250, 1, 8, 8), 0.3), 100)
        >>> batches.steps_per_epoch, batches(7).shape
        (2, torch.Size([100, 1, 8, 8]))
        >>> torch.equal(batches(7), batches(7))
        True
    """

    def __init__(
        self, images: Tensor, batch_size: int = 100, *, binarize: bool = True, seed: int = 0
    ) -> None:
        self.images = _check_means(images)
        self.batch_size = check_positive_int("batch_size", batch_size)
        if self.batch_size > len(images):
            raise ValueError(f"batch_size: expected at most the {len(images)} images, got {batch_size}")
        self.binarize, self.seed = bool(binarize), _check_seed(seed)
        self.steps_per_epoch = len(images) // self.batch_size
        self._epoch: tuple[int, Tensor] | None = None

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self._epoch = epoch, torch.from_numpy(order).to(self.images.device)
        return self._epoch[1]

    def __call__(self, step: int) -> Tensor:
        """The batch of a step, counted from 0, shape ``(batch_size, ...)``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        batch = self.images[rows]
        return _bernoulli(batch, _draw_seed(self.seed, step, 1)) if self.binarize else batch
