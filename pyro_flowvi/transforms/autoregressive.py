"""Autoregressive layers: each coordinate moves by an increasing map given all coordinates before it."""

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import MaskedMLP
from ._autoregressive_inverse import solve_autoregressive
from .base import ParametricTransform, Raw
from .coupling import BOUND, LOG_SCALE_LIMIT, NUM_BINS, pull_back, spline
from .univariate import Affine, Transformer, is_known

__all__ = ["AffineAutoregressive", "Autoregressive", "SplineAutoregressive"]

HIDDEN: Final = (64, 64)
MAX_DENSE_JACOBIAN: Final = 32
"""Up to this dimension the score is carried forward by whole Jacobians, above it through the inverse."""


class Autoregressive(ParametricTransform):
    """An autoregressive layer of any univariate transformer, with a masked network.

    :math:`y_i = g(x_i; h_i(x_1, ..., x_{i-1}))`.  The forward pass is parallel.  The inverse solves for one
    coordinate after another, inside one operator that does the arithmetic of a single forward pass, and is
    differentiable, once, by the implicit function theorem.  With a transformer of your own it takes D passes
    of the network, which autodiff follows.
    A context moves the offset of the transformer's parameters and the biases of the network.

    :param dim: the length D of the vectors.
    :param transformer: an increasing map of one variable, of P parameters; see
        :mod:`pyro_flowvi.transforms.univariate`.
    :param hidden: widths of the network's hidden layers, at least one; each better not below D - 1.
    :param activation: "tanh" or "relu".
    :param reverse: the last coordinate is the first of the order.
    :raises ValueError: if an argument is not of the described kind.

    Shapes: input ``(*, D)``; ``offset`` ``(P, D)``.

    Example::

        >>> from pyro_flowvi.transforms.univariate import Affine
        >>> Autoregressive(3, Affine(limit=2.0), hidden=(8,))(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        dim: int,
        transformer: Transformer,
        *,
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
        reverse: bool = False,
    ) -> None:
        super().__init__(dim)
        self.transformer = transformer
        self.reverse = bool(reverse)
        self.offset = nn.Parameter(torch.zeros(transformer.num_params, dim))
        self.conditioner: Any = (
            MaskedMLP(dim, hidden, transformer.num_params, activation=activation) if dim > 1 else None
        )

    def raw_parameters(self) -> dict[str, Tensor]:
        """The offset and the network's biases: what a context can move."""
        biases = {} if self.conditioner is None else self.conditioner.biases()
        return {"offset": self.offset, **biases}

    def _ordered(self, value: Tensor) -> Tensor:
        return value.flip(-1) if self.reverse else value

    def _forward(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        h = None
        if self.conditioner is not None:
            h = self.conditioner(x, raw).unflatten(-1, self.offset.shape)
        y, log_slope = self.transformer.forward(x, h, raw["offset"])
        return y, log_slope.sum(-1)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self._forward(raw, self._ordered(x))
        return self._ordered(y), log_det

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.dim > MAX_DENSE_JACOBIAN or self.conditioner is None:
            return super().forward_with_score(x, score)
        raw, x = self.raw_parameters(), self._ordered(x)
        h = self.conditioner(x, raw).unflatten(-1, self.offset.shape)
        image, log_slope = self.transformer.forward(x, h, raw["offset"])
        ones = torch.ones_like(image)
        (by_param,) = torch.autograd.grad(image.sum(), h, retain_graph=True)
        bend = pull_back([log_slope], [ones], x)
        with torch.no_grad():
            # The whole Jacobian and one triangular solve: an inverse pass would take the coordinates in turn.
            inner = self.conditioner.jacobian(x).unflatten(-2, self.offset.shape)
            jacobian = (by_param.unsqueeze(-1) * inner).sum(-3) + torch.diag_embed(log_slope.exp())
            score = self._ordered(score) if bend is None else self._ordered(score) - bend
            score = score.unsqueeze(-1)
            score = torch.linalg.solve_triangular(jacobian.mT, score, upper=True).squeeze(-1)
        return self._ordered(image), log_slope.sum(-1), self._ordered(score)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self._ordered(y)
        if self.conditioner is None:
            x, log_slope = self.transformer.inverse(y, None, raw["offset"])
            return x, log_slope.sum(-1)
        if not is_known(self.transformer):  # the operator is told the kind alone
            x, log_det = self._solve_pass_by_pass(raw, y)
            return self._ordered(x), log_det
        x = solve_autoregressive(
            lambda x: self._forward(raw, x)[0],
            y,
            self.conditioner.masked_weights(),
            [raw[name] for name in self.conditioner.biases()],
            raw["offset"],
            self.transformer.kind,
            self.transformer.limit,
            self.conditioner.activation,
        )
        return self._ordered(x), -self._forward(raw, x)[1]

    def _solve_pass_by_pass(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slopes = torch.zeros_like(y), []
        for i in range(self.dim):
            here = slice(i, i + 1)
            h = self.conditioner(x, raw).unflatten(-1, self.offset.shape)[..., here]
            solved, log_slope = self.transformer.inverse(y[..., here], h, raw["offset"][..., here])
            x = F.pad(
                torch.cat([x[..., :i].expand(*solved.shape[:-1], i), solved], -1), (0, self.dim - i - 1)
            )
            log_slopes.append(log_slope)
        return x, torch.cat(log_slopes, -1).sum(-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {self.transformer}" + (", reverse=True" if self.reverse else "")


class AffineAutoregressive(Autoregressive):
    r"""The layer of inverse and masked autoregressive flows, :math:`y_i = e^{s_i} x_i + t_i`.

    Kingma et al., *Improved Variational Inference with Inverse Autoregressive Flow*, 2016, equation 10, and
    turned around with :class:`~pyro_flowvi.transforms.Inverse` that of Papamakarios, Pavlakou and Murray,
    *Masked Autoregressive Flow for Density Estimation*, 2017.  Log-scales as in
    :class:`~pyro_flowvi.transforms.AffineCoupling`.

    :param dim: the length of the vectors.
    :param hidden: as in :class:`Autoregressive`, and so are ``activation`` and ``reverse``.
    :param limit: the bound k of what the input contributes to a log-scale.
    :raises ValueError: as :class:`Autoregressive`.

    Example::

        >>> flow = AffineAutoregressive(5)
        >>> flow.inv(flow(torch.arange(5.0))).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
        reverse: bool = False,
        limit: float = LOG_SCALE_LIMIT,
    ) -> None:
        transformer = Affine(limit)
        super().__init__(dim, transformer, hidden=hidden, activation=activation, reverse=reverse)


class SplineAutoregressive(Autoregressive):
    """The autoregressive layer of neural spline flows, the identity outside a box.

    Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows*, 2019, section 3.

    :param dim: the length of the vectors.
    :param hidden: as in :class:`Autoregressive`, and so are ``activation`` and ``reverse``.
    :param num_bins: the number of bins, at least 2.
    :param bound: the box is [-bound, bound].
    :raises ValueError: as :class:`Autoregressive`.

    Example::

        >>> SplineAutoregressive(2, num_bins=4, hidden=(8,))(torch.tensor([0.5, 100.0])).tolist()
        [0.5, 100.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = HIDDEN,
        activation: str = "tanh",
        reverse: bool = False,
        num_bins: int = NUM_BINS,
        bound: float = BOUND,
    ) -> None:
        transformer = spline(num_bins, bound)
        super().__init__(dim, transformer, hidden=hidden, activation=activation, reverse=reverse)
