"""Coupling layers: mask x conditioner x univariate transformer.

Some coordinates pass through unchanged; a network of them gives the parameters of an increasing map that
moves each of the others.  The Jacobian is triangular, and the inverse costs no more than the forward pass.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from .._checks import check_positive, check_positive_int
from ..nn import MLP
from .base import ParametricTransform, Raw, vector_jacobian
from .univariate import Additive, Affine, Multiplicative, RationalQuadratic, Transformer

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "MultiplicativeCoupling",
    "SplineCoupling",
    "coupling_mask",
]

Mask = str | Sequence[bool] | Tensor
HIDDEN: Final = (32, 32)
LOG_SCALE_LIMIT: Final = 2.0
NUM_BINS: Final = 8
BOUND: Final = 3.0


def coupling_mask(dim: int, kind: str) -> Tensor:
    """A named mask: True where a coordinate passes through unchanged.

    :param dim: the number of coordinates.
    :param kind: "first" or "second" half, "even" or "odd" places pass through.
    :raises ValueError: if ``kind`` is none of these.

    Example::

        >>> coupling_mask(5, "even")
        tensor([ True, False,  True, False,  True])
    """
    place = torch.arange(dim, device="cpu")
    masks = {
        "first": place < dim // 2,
        "second": place >= dim // 2,
        "even": place % 2 == 0,
        "odd": place % 2 == 1,
    }
    if kind not in masks:
        raise ValueError(f"mask: expected one of {list(masks)} or booleans, got {kind!r}")
    return masks[kind]


def _places(which: Tensor) -> slice | list[int]:
    """The places where ``which`` is True: a slice where they are evenly spaced."""
    places = which.nonzero().flatten().tolist()
    steps = {b - a for a, b in itertools.pairwise(places)}
    if len(steps) > 1:
        return places
    step = steps.pop() if steps else 1
    return slice(places[0], places[-1] + 1, step)


def pull_back(outputs: Sequence[Tensor], weights: Sequence[Tensor], at: Tensor) -> Tensor | None:
    """The vector-Jacobian product of outputs at a point of their graph, which is kept; None if it is zero."""
    pairs = [(value, weight) for value, weight in zip(outputs, weights, strict=True) if value.requires_grad]
    if not pairs:
        return None
    values, weights = zip(*pairs, strict=True)
    return vector_jacobian(values, weights, [at], keep=True)[0]


class Coupling(ParametricTransform):
    """A coupling layer of any mask, conditioner and univariate transformer.

    What :class:`AffineCoupling` and its like are made of; use it for a mask, network or transformer of your
    own.  A context moves the offset of the transformer's parameters and the biases of the conditioner.

    :param dim: the length D of the vectors.
    :param transformer: an increasing map of one variable, of P parameters; see
        :mod:`pyro_flowvi.transforms.univariate`.
    :param mask: D booleans, True where a coordinate passes through, or "first", "second", "even", "odd".
        With one coordinate nothing can pass: the layer is then unconditional.
    :param conditioner: a callable from (number of coordinates that pass, P times number of those that move)
        to a module of vectors with the methods of :class:`pyro_flowvi.nn.MLP`; by default that network.
    :param hidden: widths of the default conditioner's hidden layers.
    :param activation: "tanh" or "relu", of the default conditioner.
    :raises ValueError: if an argument is not of the described kind, or no coordinate is left to move.

    Shapes: input ``(*, D)``; ``offset`` ``(P, M)`` with M coordinates that move.

    Example::

        >>> from pyro_flowvi.transforms.univariate import Affine
        >>> layer = Coupling(3, Affine(limit=2.0), mask=[True, False, True], hidden=(8,))
        >>> layer(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        dim: int,
        transformer: Transformer,
        *,
        mask: Mask = "first",
        conditioner: Any = None,
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
    ) -> None:
        super().__init__(dim)
        self.transformer = transformer
        if not isinstance(mask, str | Sequence | Tensor):
            raise ValueError(f"mask: expected {dim} booleans or a name, got {mask!r}")
        keep = coupling_mask(dim, mask) if isinstance(mask, str) else torch.as_tensor(mask, device="cpu")
        if keep.dtype != torch.bool or keep.shape != (dim,):
            raise ValueError(f"mask: expected {dim} booleans, got {mask!r}")
        if dim == 1:
            keep = torch.zeros(1, dtype=torch.bool, device="cpu")
        num_kept = int(keep.sum())
        if num_kept == dim:
            raise ValueError(f"mask: expected at least one False, got {mask!r}")
        self._kept = _places(keep) if num_kept else None
        self._moved = _places(~keep)
        order = torch.cat([keep.nonzero().flatten(), (~keep).nonzero().flatten()]).argsort()
        in_order = torch.equal(order, torch.arange(dim, device="cpu"))
        swapped = torch.equal(order.roll(dim - num_kept), torch.arange(dim, device="cpu"))
        self._join = "kept, moved" if in_order else "moved, kept" if swapped else "mixed"
        self.order: Tensor
        self.register_buffer("order", order.to(torch.get_default_device()), persistent=False)
        moving = dim - num_kept
        self.offset = nn.Parameter(torch.zeros(transformer.num_params, moving))
        self.conditioner: Any = None
        if num_kept:
            sizes = (num_kept, transformer.num_params * moving)
            self.conditioner = (
                MLP(sizes[0], hidden, sizes[1], activation=activation, last_bias=False)
                if conditioner is None
                else conditioner(*sizes)
            )

    def raw_parameters(self) -> dict[str, Tensor]:
        """The offset and the conditioner's biases: what a context can move."""
        biases = {} if self.conditioner is None else self.conditioner.biases()
        return {"offset": self.offset, **{f"conditioner.{name}": b for name, b in biases.items()}}

    def _split(self, value: Tensor, raw: Raw) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """What passes, what moves, and what the conditioner says."""
        moved = value[..., self._moved]
        if self._kept is None:
            return None, moved, None
        kept = value[..., self._kept]
        prefix = "conditioner."
        biases = {name[len(prefix) :]: raw[name] for name in raw if name.startswith(prefix)}
        h = self.conditioner(kept, biases)
        return kept, moved, h.unflatten(-1, self.offset.shape)

    def _merge(self, kept: Tensor | None, moved: Tensor) -> Tensor:
        if kept is None:
            return moved
        if kept.shape[:-1] != moved.shape[:-1]:
            kept = kept.expand(*moved.shape[:-1], kept.shape[-1])
        if self._join == "moved, kept":
            return torch.cat([moved, kept], -1)
        joined = torch.cat([kept, moved], -1)
        return joined if self._join == "kept, moved" else joined.index_select(-1, self.order)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved, h = self._split(x, raw)
        moved, log_slope = self.transformer.forward(moved, h, raw["offset"])
        return self._merge(kept, moved), log_slope.sum(-1)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Jᵀ is block triangular: what moves is divided by its slope, what passes costs one vector-Jacobian
        # product of the network.
        raw = self.raw_parameters()
        kept, moved, h = self._split(x, raw)
        image, log_slope = self.transformer.forward(moved, h, raw["offset"])
        ones = torch.ones_like(log_slope)
        bend = pull_back([log_slope], [ones], moved) if self.transformer.bends else None
        score_moved = score[..., self._moved] if bend is None else score[..., self._moved] - bend
        score_moved = score_moved * (-log_slope.detach()).exp()
        score_kept = None
        if kept is not None:
            pulled = pull_back([log_slope, image], [ones, score_moved], kept)
            score_kept = score[..., self._kept] if pulled is None else score[..., self._kept] - pulled
        return self._merge(kept, image), log_slope.sum(-1), self._merge(score_kept, score_moved)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved, h = self._split(y, raw)
        moved, log_slope = self.transformer.inverse(moved, h, raw["offset"])
        return self._merge(kept, moved), log_slope.sum(-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {self.transformer}"


class AdditiveCoupling(Coupling):
    """The coupling of NICE, y = x + t: volume preserving.

    Dinh, Krueger and Bengio, *NICE: Non-linear Independent Components Estimation*, 2014, section 3.2.  Follow
    the last one with an :class:`~pyro_flowvi.transforms.ElementwiseAffine`, the paper's diagonal scaling.

    :param dim: the length of the vectors.
    :param mask: as in :class:`Coupling`, and so are ``hidden`` and ``activation``.
    :raises ValueError: as :class:`Coupling`.

    Example::

        >>> AdditiveCoupling(3).forward_and_log_det(torch.ones(4, 3))[1].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self, dim: int, *, mask: Mask = "first", hidden: Sequence[int] = HIDDEN, activation: str = "tanh"
    ) -> None:
        super().__init__(dim, Additive(), mask=mask, hidden=hidden, activation=activation)


class MultiplicativeCoupling(Coupling):
    r"""A coupling that scales, :math:`y = e^s x`, so that no factor is zero.

    Dinh, Krueger and Bengio, *NICE*, 2014, section 3.2, the multiplicative law.

    :param dim: the length of the vectors.
    :param mask: as in :class:`Coupling`, and so are ``hidden`` and ``activation``.
    :param limit: the bound k in :math:`s = b + k \tanh(h / k)`, b free.
    :raises ValueError: as :class:`Coupling`.

    Example::

        >>> MultiplicativeCoupling(2, mask="odd")(torch.ones(2)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        dim: int,
        *,
        mask: Mask = "first",
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
        limit: float = LOG_SCALE_LIMIT,
    ) -> None:
        transformer = Multiplicative(limit)
        super().__init__(dim, transformer, mask=mask, hidden=hidden, activation=activation)


class AffineCoupling(Coupling):
    r"""The coupling of RealNVP, :math:`y = e^s x + t`.

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, equations 4 and 5.  The
    log-scale is :math:`s = b + k \tanh(h / k)`: the part that depends on the input is bounded, so that no
    draw explodes, and b is free, so that any contraction can be learnt.

    :param dim: the length of the vectors.
    :param mask: as in :class:`Coupling`, and so are ``hidden`` and ``activation``.
    :param limit: the bound k.
    :raises ValueError: as :class:`Coupling`.

    Example::

        >>> flow = AffineCoupling(4, mask="even", hidden=(16,))
        >>> flow.inv(flow(torch.ones(4))).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        mask: Mask = "first",
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
        limit: float = LOG_SCALE_LIMIT,
    ) -> None:
        transformer = Affine(limit)
        super().__init__(dim, transformer, mask=mask, hidden=hidden, activation=activation)


class SplineCoupling(Coupling):
    """The coupling of neural spline flows: a rational-quadratic spline, the identity outside a box.

    Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows*, 2019, section 3.  Put an
    :class:`~pyro_flowvi.transforms.ElementwiseAffine` around it, so that the box covers what it has to.

    :param dim: the length of the vectors.
    :param mask: as in :class:`Coupling`, and so are ``hidden`` and ``activation``.
    :param num_bins: the number of bins, at least 2.
    :param bound: the box is [-bound, bound].
    :raises ValueError: as :class:`Coupling`.

    Example::

        >>> flow = SplineCoupling(2, num_bins=4)
        >>> flow(torch.tensor([0.5, 100.0])).tolist()
        [0.5, 100.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        mask: Mask = "first",
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
        num_bins: int = NUM_BINS,
        bound: float = BOUND,
    ) -> None:
        transformer = spline(num_bins, bound)
        super().__init__(dim, transformer, mask=mask, hidden=hidden, activation=activation)


def spline(num_bins: int, bound: float) -> RationalQuadratic:
    """The checked transformer of a spline layer."""
    if check_positive_int("num_bins", num_bins) not in range(2, 513):
        raise ValueError(f"num_bins: expected 2 to 512, got {num_bins}")
    return RationalQuadratic(check_positive("bound", bound), num_bins)
