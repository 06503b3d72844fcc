"""One elementwise flow for the noise of many latents, each in its own context."""

import torch
from torch import Tensor, nn

__all__ = ["LocalShape"]

HIDDEN, NUM_CONTEXT = 16, 4
MOST_SHIFT, MOST_LOG_SCALE, MOST_LOG_TAIL = 3.0, 2.0, 1.5
"""Bounds of what the network can ask for, so that any parameters give a bijection within float32."""


class LocalShape(nn.Module):
    """The sinh-arcsinh transform (Jones and Pewsey 2009) with parameters by a network of a context.

    e = a + exp(b) sinh(exp(d) asinh(x) + c): a shifts, b scales, c skews and d sets the tails.  The context
    is what tells one latent from another: its conditional mean and scale, how much of its precision comes
    from the data, and how far these move it from its prior.  All elements share the network, so that it is
    learned from all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context_loc = nn.Parameter(torch.zeros(NUM_CONTEXT))
        self.context_log_scale = nn.Parameter(torch.zeros(NUM_CONTEXT))
        self.first = nn.Linear(NUM_CONTEXT, HIDDEN)
        self.last = nn.Linear(HIDDEN, 4)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def is_identity(self) -> bool:
        """Whether it is the identity in every context, as it is until it is trained."""
        return not bool(self.last.weight.any() | self.last.bias.any())

    def coefficients(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b, c and d for contexts ``(P, M, 4)``, each ``(P, M)``."""
        scaled = (context - self.context_loc) * (-self.context_log_scale).exp()
        a, b, c, d = self.last(torch.tanh(self.first(scaled))).unbind(-1)
        return (
            MOST_SHIFT * torch.tanh(a / MOST_SHIFT),
            MOST_LOG_SCALE * torch.tanh(b / MOST_LOG_SCALE),
            MOST_SHIFT * torch.tanh(c / MOST_SHIFT),
            MOST_LOG_TAIL * torch.tanh(d / MOST_LOG_TAIL),
        )

    def forward_and_log_det(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The image of noise ``(P, M)``, and log de/dx of each."""
        a, b, c, d = self.coefficients(context)
        inner = d.exp() * torch.asinh(x) + c
        e = a + b.exp() * torch.sinh(inner)
        return e, b + d + _log_cosh(inner) - 0.5 * torch.log1p(x.square())

    def inverse_and_log_det(self, e: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of ``(P, M)``, and log dx/de of each."""
        a, b, c, d = self.coefficients(context)
        inner = torch.asinh((e - a) * (-b).exp())
        x = torch.sinh((inner - c) * (-d).exp())
        return x, 0.5 * torch.log1p(x.square()) - b - d - _log_cosh(inner)


def _log_cosh(x: Tensor) -> Tensor:
    size = x.abs()
    return size + torch.log1p((-2.0 * size).exp()) - 0.6931471805599453
