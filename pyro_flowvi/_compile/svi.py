"""CompiledSVI: Pyro's SVI with the gradient step traced once and run as machine code."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from .._bar import tqdm
from .._checks import check_positive_int
from .._program.call import check_programs
from .._types import CompileMode, Program
from ..objectives._choice import as_objective
from .errors import CannotCompile
from .optimizers import as_pyro_optim
from .stepper import Stepper

__all__ = ["CompiledSVI"]


class CompiledSVI(SVI):
    """``pyro.infer.SVI`` whose step runs as machine code: model, guide, gradient and optimizer in one.

    The loss and its gradient are traced once into a graph, to which Adam, AdamW or ClippedAdam are added;
    Inductor compiles it.  Parameters stay those of the modules and of the param store at every moment, and
    random numbers follow ``pyro.set_rng_seed`` and are those of eager Pyro.  Before it is used, and at its
    10th, 100th, ... call, a compiled step is compared with the eager one; what cannot be compiled runs
    eagerly, after one :class:`CompileWarning` that names the cause.

    A graph holds what Python did while it was traced.  Pass what changes between steps as tensor arguments:
    a new shape, or a new value of an argument that is not a tensor, is a new graph, of which eight
    are kept.

    At every step it looks whether what model and guide reach is still the same, and traces anew where it
    is not: what their functions name as globals, close over, have as defaults or attributes or are bound
    to; attributes of modules, private ones too, of objects and classes of yours, in slots as well, of
    ``SimpleNamespace`` and ``argparse.Namespace``, of Pyro's handlers and objectives, of distributions;
    entries of lists, dicts, sets and deques; contents of numpy arrays up to 4 KiB. An attribute of an
    object of yours counts if code that is reached names it, or uses ``getattr`` and its like. Comparisons
    take up to about 0.1 ms a step, nearest values first: what is beyond, in programs of thousands of
    values, and larger arrays, is compared by identity and length then and in full before the comparisons
    at the 10th, 100th, ... call. A program that itself changes such values while it runs, a counter or a
    list of losses, runs eagerly, as does one whose values change at each of three steps in succession.

    Not watched, and seen only by the comparisons with eager: what a program gets by a call (a file, a
    clock, ``os.environ``, a context variable, a weak reference), attributes of other libraries' objects
    (a data frame, whatever lies in ``site-packages``) and of Pyro's autoguides, tensors that Python has
    read and numpy or ``.data`` has changed, arrays above 64 MiB. A step that fails, in a comparison or
    later, is taken by eager Pyro, as are all after it.

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param optim: a ``pyro.optim`` optimizer, a ``torch.optim`` class, or an optimizer of that kind over the
        parameters.  Adam, AdamW and ClippedAdam are compiled, the others run between compiled gradients.
    :param loss: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO`` or ``RenyiELBO``, an objective
        of this package, or a function that returns a differentiable loss; any other runs eagerly.
    :param compile: True compiles after the first step, and raises where that fails; "auto" compiles where
        it pays, judged by counts alone: in :meth:`run` by the number of steps and the size of the graph, in
        :meth:`step` after 200 calls; False never does.
    :raises ValueError: if an argument is not of the described kind.
    :raises CannotCompile: with ``compile=True``, for an objective that is not supported.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
        >>> losses = svi.run(300, torch.tensor([2.0, 3.0, 4.0]), progress=False)
        >>> losses.shape, abs(guide.median()["mu"].item() - 3.0) < 0.5
        (torch.Size([300]), True)
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim | torch.optim.Optimizer | type[torch.optim.Optimizer],
        loss: ELBO | type[ELBO] | Callable[..., Any] | None = None,
        *,
        compile: CompileMode = "auto",
    ) -> None:
        check_programs(model, guide)
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")
        optim = as_pyro_optim(optim)
        loss = Trace_ELBO() if loss is None else as_objective(loss)
        if not callable(loss):
            raise ValueError(f"loss: expected a pyro.infer.ELBO or a function, got {loss!r}")
        super().__init__(model, guide, optim, loss)
        self._stepper = Stepper(self, loss, compile=compile)

    @property
    def compiled(self) -> bool:
        """Whether a step has been traced and is in use."""
        return bool(self._stepper.graphs.steps)

    @property
    def cause(self) -> CannotCompile | None:
        """Why all steps are eager; None while they are compiled or may be."""
        return self._stepper.graphs.cause

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one gradient step.

        :param args: the model's and guide's positional arguments; tensors may be nested in tuples, lists and
            dicts.
        :param kwargs: their keyword arguments.
        :return: the loss, as Pyro's SVI reports it.
        :raises ValueError: at the first step, for data on another device than the guide's.
        :raises CannotCompile: with ``compile=True``, where the step cannot be compiled.
        """
        return self._stepper.take(self, args, kwargs, 1, None)[0].loss

    def run(self, num_steps: int, *args: Any, progress: bool = True, **kwargs: Any) -> Tensor:
        """Takes many steps on the same arguments.

        A learning-rate schedule advances where its own ``step`` is called: between runs.

        :param num_steps: how many.
        :param args: as for :meth:`step`.
        :param progress: shows a progress bar.
        :param kwargs: as for :meth:`step`.
        :return: the losses, shape ``(num_steps,)``, on the parameters' device.
        :raises ValueError: if ``num_steps`` is not a positive integer.
        :raises CannotCompile: as :meth:`step`.
        """
        check_positive_int("num_steps", num_steps)
        losses: list[Any] = []
        with tqdm(total=num_steps, disable=not progress, desc=type(self.guide).__name__) as bar:
            while len(losses) < num_steps:
                left = num_steps - len(losses)
                found = self._stepper.losses(self, args, kwargs, min(left, max(1, num_steps // 100)), left)
                losses += found
                bar.update(len(found))
                if isinstance(losses[-1], float):
                    bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
        if any(isinstance(loss, Tensor) for loss in losses):
            device = next(loss.device for loss in losses if isinstance(loss, Tensor))
            return torch.stack([torch.as_tensor(loss, device=device) for loss in losses])
        return torch.tensor(losses)
