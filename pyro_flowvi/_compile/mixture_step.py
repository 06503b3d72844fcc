"""A gradient step of a mixture of flows on a model's density, without Pyro: its component is summed out."""

import math

import torch
from torch import Tensor

from ..distributions import MixtureOfFlows
from ..transforms import Compose
from ..transforms.base import vector_jacobian
from .flow_step import FlowStep
from .optimizers import flatten

__all__ = ["MixtureStep", "SingleStep"]


class SingleStep(FlowStep):
    """Steps of a mixture of one flow: those of the flow by itself, which are several times as fast.

    :param transform: one flow, stacked.
    :param params: its parameters that are trained.
    :param options: those of :class:`FlowStep`.
    """

    def _set_up(self, like: Tensor) -> None:
        super()._set_up(like)
        alone = Compose([part.part(0) for part in self._transform], dim=self._transform.dim)
        self._live = [param for param in alone.parameters() if param.requires_grad]
        for own, stacked in zip(self._live, self.params, strict=True):
            own.data = stacked.data[0]  # the same memory
        self._transform = alone


class MixtureStep(FlowStep):
    """Steps of Adam on the path gradient of the ELBO of a mixture of K flows.

    The estimator of :class:`~pyro_flowvi.objectives.TraceEnumSTL_ELBO` with as many draws of every component,
    which are scored by the whole mixture: exact in the weights.

    :param transform: K flows in one, whose ``logits`` are the logarithms of their weights up to a constant.
    :param params: its parameters that are trained.
    :param density: the model, whose width is K times the number of particles.
    :param options: those of :class:`FlowStep`.
    :raises CannotCompile: as of that.
    """

    def _set_up(self, like: Tensor) -> None:
        dim, num = self._density.density.dim, len(self._transform.logits)
        size = (self._density.width // num, num, dim)
        self._noise = {"size": size, "dtype": like.dtype, "device": like.device}
        self._slope = {**self._noise, "size": (self._density.width, dim + 1)}

    def _pass(self, x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        return self._reference(x, slope)

    def _reference(self, x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        """Draws of all components as rows, log q there and its score, and the gradient of the loss.

        :param slope: by row the loss's slope at the draw, as if its component had the weight one, and the
            draw's part of the loss of its component.
        """
        flow, logits = self._transform, self._transform.logits
        with torch.enable_grad():
            z = flow(x.detach())
            leaf = z.detach().requires_grad_()
            log_q = MixtureOfFlows(None, flow, logits, validate_args=False).log_prob(leaf)
            (score,) = torch.autograd.grad(log_q.sum(), leaf)
            # Before the slope is read, which is made of them.
            rows, score = (y.reshape(-1, y.shape[-1]) for y in (leaf.detach(), score))
            log_q = log_q.detach().reshape(-1)
            weights = logits.detach().softmax(-1)
            parts = slope.reshape(*x.shape[:-1], -1)
            at_draws = weights.unsqueeze(-1) * parts[..., :-1]
            found = vector_jacobian([z], [at_draws], self.params)
        losses = parts[..., -1].sum(0)
        of_logits = weights * (losses - weights @ losses)
        grads = []
        for param, grad in zip(self.params, found, strict=True):
            known = of_logits if param is logits else torch.zeros_like(param)
            grads.append(known if grad is None else grad)
        return rows, log_q, score, flatten(grads)

    def _weigh(self, z: Tensor, log_q: Tensor, score: Tensor) -> Tensor:
        value, gradient = self._model_at(z)
        weights, slope = value - log_q, score - gradient
        num = len(self._transform.logits)
        shares = self._transform.logits.detach().softmax(-1).to(weights)
        each = weights.reshape(-1, num)
        scale = torch.full_like(each[0], 1.0 / len(each))
        loss = -(shares @ each.sum(0)).item() / len(each)
        self._dropped = 0
        if not (math.isfinite(loss) and math.isfinite(slope.sum().item())):
            good = weights.isfinite() & slope.isfinite().all(-1)
            count = good.reshape(-1, num).sum(0)
            self._dropped = len(z) - int(count.sum())
            slope = torch.where(good.unsqueeze(-1), slope, 0.0)
            each = torch.where(good.reshape(-1, num), each, 0.0)
            scale = 1.0 / count.to(each)
            loss = -float(shares @ (each.sum(0) * scale)) if bool(count.all()) else math.nan
        self._loss = loss
        both = torch.cat([slope, -each.reshape(-1, 1)], -1)
        return (both * scale.repeat(len(each)).unsqueeze(-1)).to(z.dtype)
