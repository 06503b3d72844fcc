"""Path gradients where Pyro enumerates discrete sites."""

from typing import Any

from pyro.infer import TraceEnum_ELBO

from .._program.scoring import Scoring
from .._types import Program

__all__ = ["TraceEnumSTL_ELBO"]


class TraceEnumSTL_ELBO(TraceEnum_ELBO):
    """``TraceEnum_ELBO`` with the path gradient of :class:`~pyro_flowvi.AutoFlowMixture`.

    With the component summed out exactly, the density of the mixture has a score of mean zero, as that of one
    flow has: without it the gradient is unbiased still, and has no variance where the guide is the posterior.
    Of other guides it is ``TraceEnum_ELBO``.

    :param num_particles: draws a step, of each component.
    :param options: the other options of ``pyro.infer.ELBO``.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(1.0, 2.0))
        >>> guide = pyro_flowvi.AutoFlowMixture(model, 2)
        >>> elbo = TraceEnumSTL_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step()
    """

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        with Scoring():
            return super()._get_trace(model, guide, args, kwargs)
