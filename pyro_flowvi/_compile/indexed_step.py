"""A gradient step of a continuously-indexed flow on a model's density, without Pyro."""

import torch
from torch import Tensor

from ..distributions.flow import standard_normal_log_prob
from .flow_step import FlowStep

__all__ = ["IndexedStep"]


class IndexedStep(FlowStep):
    """Steps of Adam on the path gradient of the auxiliary ELBO.

    That is the ELBO of an ordinary flow over the latents and the noise of the indices, where the target of
    the noise is the standard normal.

    :param transform: an :class:`~pyro_flowvi.transforms.IndexedCompose`.
    :param params: its parameters that are trained.
    :param density: the model, of the latents alone.
    :param options: those of :class:`FlowStep`.
    :raises CannotCompile: as of that.
    """

    def _set_up(self, like: Tensor) -> None:
        super()._set_up(like)
        size = (self._density.width, self._transform.dim)
        self._noise = self._slope = {**self._noise, "size": size}

    def _model_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        latent, noise = z.tensor_split([self._transform.inner_dim], -1)
        value, gradient = super()._model_at(latent.contiguous())
        return value + standard_normal_log_prob(noise), torch.cat([gradient, -noise.to(gradient)], -1)
