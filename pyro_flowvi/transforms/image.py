"""Image flows: squeeze, masks, 1 x 1 convolutions and the multi-scale architecture of RealNVP.

An image of shape (C, H, W) is a flat vector of length D = C H W, channels first, rows before columns, so
that an image flow is a transform of vectors as any other.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from .._checks import check_positive, check_positive_int
from ..nn import ConvResNet, check_image_shape
from ..numerics import finite_scale
from .base import FlowTransform, ParametricTransform, Raw
from .compose import Compose, ConditionalCompose
from .conditional import Conditional
from .coupling import LOG_SCALE_LIMIT, Coupling, coupling_mask
from .univariate import Affine

__all__ = ["Conv1x1", "Partial", "Squeeze2d", "channel_mask", "checkerboard_mask", "multiscale_realnvp"]

Shape = tuple[int, int, int]
SMALLEST_SIDE: Final = 4


def _squeezed_shape(shape: Sequence[int]) -> Shape:
    channels, height, width = check_image_shape("shape", shape)
    if height % 2 or width % 2:
        raise ValueError(f"shape: expected an even height and width, got {tuple(shape)}")
    return 4 * channels, height // 2, width // 2


def _squeeze(x: Tensor, shape: Shape) -> Tensor:
    """Flat images with each 2 x 2 square of pixels made one pixel."""
    channels, height, width = shape
    squares = x.reshape(*x.shape[:-1], channels, height // 2, 2, width // 2, 2)
    return squares.movedim((-3, -1, -5), (-5, -4, -3)).flatten(-5)


class Squeeze2d(FlowTransform):
    """Space to depth, (C, H, W) to (4 C, H / 2, W / 2): each square of 2 x 2 pixels becomes one.

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.6.  A fixed
    permutation: pixel (c, 2 i + a, 2 j + b) goes to channel (2 a + b) C + c of pixel (i, j).

    :param shape: of an image, ``(C, H, W)``.
    :raises ValueError: if a size is not a positive integer, or height or width are odd.

    Shapes: input and output ``(*, C H W)``; ``out_shape`` is (4 C, H / 2, W / 2).

    Example::

        >>> squeeze = Squeeze2d((1, 2, 4))
        >>> squeeze.out_shape
        (4, 1, 2)
        >>> squeeze(torch.arange(8.0)).reshape(squeeze.out_shape).flatten(1).tolist()
        [[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [5.0, 7.0]]
    """

    # The sign is +1: rows of pixels move by the pair, blocks in an even number of copies.

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(math.prod(check_image_shape("shape", shape)))
        self.shape = check_image_shape("shape", shape)
        self.out_shape = _squeezed_shape(self.shape)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _squeeze(x, self.shape), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        channels, height, width = self.shape
        squares = y.reshape(*y.shape[:-1], 2, 2, channels, height // 2, width // 2)
        x = squares.movedim((-5, -4, -3), (-3, -1, -5)).flatten(-5)
        return x, y.new_zeros(y.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.shape} -> {self.out_shape}"


def checkerboard_mask(shape: Sequence[int], parity: str) -> Tensor:
    """The mask of a chess board, for ``Coupling(mask=...)``: True where a pixel passes through.

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.4.

    :param shape: of an image, ``(C, H, W)``, of at least two pixels.
    :param parity: "even" or "odd": whether row + column are so where a pixel passes.
    :return: C H W booleans.
    :raises ValueError: if ``shape`` or ``parity`` is not as described.

    Example::

        >>> checkerboard_mask((1, 2, 3), "even").reshape(2, 3)
        tensor([[ True, False,  True],
                [False,  True, False]])
    """
    channels, height, width = check_image_shape("shape", shape)
    if parity not in ("even", "odd"):
        raise ValueError(f"parity: expected 'even' or 'odd', got {parity!r}")
    if height * width < 2:
        raise ValueError(f"shape: expected at least two pixels, got {tuple(shape)}")
    row, column = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
    board = (row.unsqueeze(-1) + column) % 2 == (parity == "odd")
    return board.flatten().repeat(channels)


def channel_mask(shape: Sequence[int], half: str) -> Tensor:
    """The mask of whole channels, for ``Coupling(mask=...)``: True where a pixel passes through.

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.4.

    :param shape: of an image, ``(C, H, W)``, of at least two channels.
    :param half: the "first" or "second" half of the channels passes, or the "even" or "odd" ones.
    :return: C H W booleans.
    :raises ValueError: if ``shape`` or ``half`` is not as described.

    Example::

        >>> channel_mask((2, 1, 3), "second")
        tensor([False, False, False,  True,  True,  True])
    """
    channels, height, width = check_image_shape("shape", shape)
    if half not in ("first", "second", "even", "odd"):
        raise ValueError(f"half: expected 'first', 'second', 'even' or 'odd', got {half!r}")
    if channels < 2:
        raise ValueError(f"shape: expected at least two channels, got {tuple(shape)}")
    return coupling_mask(channels, half).repeat_interleave(height * width)


class Conv1x1(ParametricTransform):
    r"""An invertible 1 x 1 convolution, :math:`f(x)_{ij} = (I + L) e^S (I + U) x_{ij}` at each pixel.

    Kingma and Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018, section 3.2, in the
    LU form without the fixed permutation: it starts as the identity, and any real parameter is valid.  L is
    strictly lower and U strictly upper triangular, S diagonal; log \|det\| is H W times the trace of S.

    :param shape: of an image, ``(C, H, W)``.
    :raises ValueError: if a size is not a positive integer.

    Shapes: input ``(*, C H W)``; ``lu`` ``(C, C)`` is L below its diagonal, S on it, U above.

    Example::

        >>> flow = Conv1x1((3, 2, 2))
        >>> flow(torch.ones(5, 12)).shape
        torch.Size([5, 12])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(math.prod(check_image_shape("shape", shape)))
        self.shape = check_image_shape("shape", shape)
        self.lu = nn.Parameter(torch.zeros(self.shape[0], self.shape[0]))

    def _mix(self, matrix: Tensor, x: Tensor) -> Tensor:
        mixed: Tensor = matrix @ x.unflatten(-1, (self.shape[0], -1))
        return mixed.flatten(-2)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, scale, trace = self._factors(raw["lu"])
        y = self._mix(lower @ (scale.unsqueeze(-1) * upper), x)
        return y, trace.expand(y.shape[:-1])

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, scale, trace = self._factors(raw["lu"])
        # The inverse of a C x C matrix once, rather than two solves for every pixel.
        eye = torch.eye(self.shape[0], dtype=y.dtype, device=y.device)
        inner = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        inner = inner / scale.unsqueeze(-1)
        inverse = torch.linalg.solve_triangular(upper, inner, upper=True, unitriangular=True)
        x = self._mix(inverse, y)
        return x, -trace.expand(x.shape[:-1])

    def _factors(self, lu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """I + L, I + U, the scales, and log |det|."""
        eye = torch.eye(self.shape[0], dtype=lu.dtype, device=lu.device)
        scale, log_scale = finite_scale(lu.diagonal(dim1=-2, dim2=-1))
        log_det = self.shape[1] * self.shape[2] * log_scale.sum(-1)
        return lu.tril(-1) + eye, lu.triu(1) + eye, scale, log_det

    def extra_repr(self) -> str:
        return f"{self.shape}"


class Partial(ParametricTransform):
    """A transform of some of the coordinates; the others pass through, and have no influence.

    What makes a flow multi-scale: coordinates that no later layer moves are factored out (Dinh,
    Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.6).

    :param layer: a transform of vectors as long as ``places``.
    :param places: the indices of the coordinates that it moves, in its own order.
    :param dim: the length D of the vectors.
    :raises ValueError: if ``places`` are not different indices below ``dim``, as many as ``layer`` takes.

    Shapes: input ``(*, D)``.

    Example::

        >>> from pyro_flowvi.transforms import ElementwiseAffine
        >>> Partial(ElementwiseAffine(1, scale=3.0), [2], dim=3)(torch.ones(3)).detach().round()
        tensor([1., 1., 3.])
    """

    def __init__(self, layer: ParametricTransform, places: Sequence[int] | Tensor, dim: int) -> None:
        super().__init__(dim)
        if not isinstance(layer, ParametricTransform):
            raise ValueError(f"layer: expected a ParametricTransform, got {layer!r}")
        moved = torch.as_tensor(places, device="cpu").long()
        rest = sorted(set(range(dim)) - set(moved.tolist()))
        if moved.shape != (layer.dim,) or len(rest) != dim - layer.dim:
            raise ValueError(
                f"places: expected {layer.dim} different indices from 0 to {dim - 1}, got {places}"
            )
        self.layer = layer
        self.exact_inverse = layer.exact_inverse
        order = torch.cat([moved, torch.tensor(rest, dtype=torch.long, device="cpu")])
        self.order: Tensor
        self.undo: Tensor
        device = torch.get_default_device()
        self.register_buffer("order", order.to(device), persistent=False)
        self.register_buffer("undo", order.argsort().to(device), persistent=False)

    def raw_parameters(self) -> dict[str, Tensor]:
        """Those of the layer."""
        return self.layer.raw_parameters()

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        part, rest = x.index_select(-1, self.order).tensor_split([self.layer.dim], -1)
        return part, rest

    def _join(self, part: Tensor, rest: Tensor) -> Tensor:
        rest = rest.expand(*part.shape[:-1], rest.shape[-1])
        return torch.cat([part, rest], -1).index_select(-1, self.undo)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        part, rest = self._split(x)
        part, log_det = self.layer.forward_given(raw, part)
        return self._join(part, rest), log_det

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        part, rest = self._split(y)
        part, log_det = self.layer.inverse_given(raw, part)
        return self._join(part, rest), log_det


def _most_scales(shape: Shape, smallest: int) -> int:
    """How many scales an image allows: it is squeezed while no side gets odd or below ``smallest``."""
    _, height, width = shape
    scales = 1
    while height % 2 == width % 2 == 0 and min(height, width) >= 2 * smallest:
        height, width, scales = height // 2, width // 2, scales + 1
    return scales


def multiscale_realnvp(
    shape: Sequence[int],
    *,
    num_scales: int | None = None,
    num_layers: int = 3,
    channels: int = 32,
    num_blocks: int = 2,
    activation: str = "relu",
    conv1x1: bool = False,
    context_dim: int | None = None,
    hidden: Sequence[int] = (32,),
    limit: float = LOG_SCALE_LIMIT,
) -> Any:
    """The multi-scale RealNVP of images, from noise to pixels; it starts as the identity.

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.6.  From pixels to
    noise, at each scale: affine couplings on checkerboards, a squeeze, affine couplings on halves of the
    channels; then half of the channels are noise already, and the others go to the next scale.  The last
    scale is ``num_layers + 1`` couplings on checkerboards.  Noise stands where the pixels that it becomes
    stand.

    :param shape: of an image, ``(C, H, W)``.
    :param num_scales: the number of scales; by default as many as leave sides of at least four pixels.  An
        odd side ends the squeezing: with one scale there are checkerboards only.
    :param num_layers: the number of couplings of each kind at each scale.
    :param channels: of the networks' hidden layers.
    :param num_blocks: the number of residual blocks of a network, see :class:`pyro_flowvi.nn.ConvResNet`.
    :param activation: of the networks, "tanh" or "relu".
    :param conv1x1: whether a :class:`Conv1x1` follows each squeeze.
    :param context_dim: the length of the context vectors, for a conditional flow.
    :param hidden: widths of the hidden layers of the networks of the context.
    :param limit: the bound on what the networks add to a log-scale, see
        :class:`~pyro_flowvi.transforms.AffineCoupling`.
    :return: a transform of vectors of length C H W, with ``condition(context)`` if ``context_dim`` is given.
    :raises ValueError: if a size is not a positive integer, or ``num_scales`` more than the sides allow.

    Example::

        >>> flow = multiscale_realnvp((1, 8, 8), num_scales=2, num_layers=2, channels=4, num_blocks=1)
        >>> pyro_flowvi.distributions.FlowDistribution(None, flow).sample((5,)).reshape(5, 1, 8, 8).shape
        torch.Size([5, 1, 8, 8])
    """
    now = check_image_shape("shape", shape)
    check_positive_int("num_layers", num_layers)
    transformer = Affine(check_positive("limit", limit))
    most = _most_scales(now, 1)
    scales = _most_scales(now, SMALLEST_SIDE) if num_scales is None else num_scales
    if check_positive_int("num_scales", scales) > most:
        raise ValueError(f"num_scales: expected at most {most} for sides {now[1]} x {now[2]}, got {scales}")
    dim = math.prod(now)
    places = torch.arange(dim, device="cpu")
    parts: list[Any] = []  # from pixels to noise

    def add(layer: ParametricTransform) -> None:
        if not torch.equal(places, torch.arange(dim, device="cpu")):
            layer = Partial(layer, places, dim)
        parts.append(layer if context_dim is None else Conditional(layer, context_dim, hidden))

    def add_couplings(count: int, masks: Sequence[Tensor]) -> None:
        for i in range(count):
            mask = masks[i % 2]

            def net(*_: int, mask: Tensor = mask) -> ConvResNet:
                return ConvResNet(
                    now,
                    mask,
                    transformer.num_params,
                    channels=channels,
                    num_blocks=num_blocks,
                    activation=activation,
                )

            add(Coupling(len(mask), transformer, mask=mask, conditioner=net))

    for _ in range(scales - 1):
        add_couplings(num_layers, [checkerboard_mask(now, parity) for parity in ("even", "odd")])
        places, now = _squeeze(places, now), _squeezed_shape(now)
        if conv1x1:
            add(Conv1x1(now))
        add_couplings(num_layers, [channel_mask(now, half) for half in ("first", "second")])
        now = (now[0] // 2, now[1], now[2])
        places = places[: math.prod(now)]
    if now[1] * now[2] > 1:
        masks = [checkerboard_mask(now, parity) for parity in ("even", "odd")]
    else:
        masks = [coupling_mask(now[0], half) for half in ("first", "second")]
    add_couplings(num_layers + 1, masks)
    return Compose(parts[::-1]) if context_dim is None else ConditionalCompose(parts[::-1])
