"""Adam, AdamW and ClippedAdam on flat tensors, traced into the step and in step with Pyro's optimizers."""

import inspect
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.optim.clipped_adam
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .._program.pyro_private import load_optimizer_state

__all__ = [
    "FlatParameters",
    "Rule",
    "TorchOptim",
    "as_pyro_optim",
    "flatten",
    "inner_optimizer",
    "make_buckets",
    "meet",
]

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Rule:
    """The hyperparameters of Adam (Kingma and Ba 2015, algorithm 1) and its variants.

    :param decoupled: weight decay acts on the parameter (Loshchilov and Hutter 2019), not on the gradient.
    :param clip: bound on every entry of the gradient (``pyro.optim.ClippedAdam``).
    :param decay: factor on the learning rate at every step (the same).
    :param centered: the second moment is that of the gradient about its mean (the same).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    clip: float = math.inf
    decay: float = 1.0
    centered: bool = False
    pyro_form: bool = False

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is Adam itself."""
        variant = self.pyro_form or self.centered or self.weight_decay
        return not variant and self.decay == 1.0 and math.isinf(self.clip)

    def gradient(self, param: Tensor, grad: Tensor) -> Tensor:
        """The gradient that the moments see: clipped, with weight decay unless that is decoupled."""
        if math.isfinite(self.clip):
            grad = grad.clamp(-self.clip, self.clip)
        return grad + self.weight_decay * param if self.weight_decay and not self.decoupled else grad

    def moments(self, grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The moments after a gradient."""
        beta1, beta2 = self.betas
        if self.pyro_form:
            first = beta1 * first + (1.0 - beta1) * grad
        else:
            first = first + (1.0 - beta1) * (grad - first)
        spread = grad - first if self.centered else grad
        return first, beta2 * second + (1.0 - beta2) * spread * spread

    def move(
        self, param: Tensor, first: Tensor, second: Tensor, steps: Tensor, lr: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """Parameters of given sizes, end to end, after a step; its counts, one each, and rate are float64."""
        beta1, beta2 = self.betas

        def spread(values: Tensor) -> Tensor:
            parts = zip(values.to(param.dtype).unbind(), sizes, strict=True)
            return torch.cat([value.expand(size) for value, size in parts])

        if self.weight_decay and self.decoupled:
            param = param * (1.0 - lr * self.weight_decay).to(param.dtype)
        rate = lr / (1.0 - beta1**steps)
        root = (1.0 - beta2**steps).sqrt()
        if self.pyro_form:  # eps is added before the bias correction
            return param - spread(rate * root) * first / (second.sqrt() + self.eps)
        return param - spread(rate) * first / (second.sqrt() / spread(root) + self.eps)

    def change(self, grad: Tensor, first: Tensor, second: Tensor, count: float, lr: float) -> Tensor:
        """Takes a gradient into the moments, in place; by how much the parameters move, of Adam itself.

        :param count: of the steps, this one included.
        """
        beta1, beta2 = self.betas
        first.lerp_(grad, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        root = second.sqrt().div_(math.sqrt(1.0 - beta2**count)).add_(self.eps)
        return (first / root).mul_(-lr / (1.0 - beta1**count))


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors end to end."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class TorchOptim(PyroOptim):
    """An optimizer of ``torch.optim`` over given parameters, as a Pyro optimizer.

    :raises ValueError: at a step that meets a parameter which the optimizer does not have.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer

    def meet(self, params: Iterable[Tensor]) -> None:
        for param in params:
            if param not in self.optim_objs:
                if _find_group(self.optimizer, param) is None:
                    name = pyro.get_param_store().param_name(param)
                    raise ValueError(
                        f"optim: expected an optimizer over all parameters, got one without {name!r}"
                    )
                self.optim_objs[param], self.grad_clip[param] = self.optimizer, None

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        self.meet(params)
        self.optimizer.step(*args, **kwargs)


def meet(optim: PyroOptim, params: Iterable[Tensor]) -> None:
    """Makes the optimizers of parameters that Pyro's wrapper sees for the first time, without a step."""
    if isinstance(optim, TorchOptim):
        return optim.meet(params)
    for param in params:
        if param not in optim.optim_objs:
            optimizer = optim.optim_objs[param] = optim._get_optim(param)
            optim.grad_clip[param] = optim._get_grad_clip(param)  # type: ignore[arg-type]
            name = pyro.get_param_store().param_name(param)
            state = optim._state_waiting_to_be_consumed.pop(name, None)
            if state is not None:
                load_optimizer_state(optimizer, state)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, or the one that a scheduler drives."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _find_group(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any] | None:
    return next((g for g in optimizer.param_groups if any(param is p for p in g["params"])), None)


def read_rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule | None:
    """The rule that an optimizer follows for a group of parameters; None if it cannot be fused."""
    kind = type(optimizer)
    if isinstance(group.get("lr"), Tensor) or any(param.is_complex() for param in group["params"]):
        return None
    if kind is pyro.optim.clipped_adam.ClippedAdam:
        return Rule(
            tuple(group["betas"]),
            group["eps"],
            group["weight_decay"],
            clip=group["clip_norm"],
            decay=group["lrd"],
            centered=group.get("centered_variance", False),
            pyro_form=True,
        )
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        if any(group.get(flag) for flag in ("amsgrad", "maximize", "capturable", "differentiable", "fused")):
            return None
        decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
        betas = tuple(group["betas"])
        if any(isinstance(beta, Tensor) for beta in betas):
            return None
        return Rule(betas, group["eps"], group["weight_decay"], decoupled=decoupled)
    return None


class FlatParameters:
    """Parameters of one dtype, device and rule, with their moments end to end.

    The moments in the optimizers' states become views of the bucket's, so that eager steps and fused steps
    can alternate.  The parameters stay where they are, since others may hold views of them.

    :param params: the parameters, leaves.
    :param optimizers: theirs, in order; None where there are none to keep in step with.
    :param rule: the rule that they share, with the learning rate; None where the step is left to others and
        only gradients are wanted.
    """

    def __init__(
        self,
        params: list[Tensor],
        optimizers: list[torch.optim.Optimizer] | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.params, self.optimizers, self.rule = params, optimizers or [], rule
        self.values = [param.detach() for param in params]
        """The parameters' memory."""
        self.sizes = [param.numel() for param in params]
        self._addresses = [param.data_ptr() for param in params]
        self._lr = math.nan
        if rule is not None:
            dtype, device = params[0].dtype, params[0].device
            self.first, self.second = (torch.zeros(sum(self.sizes), dtype=dtype, device=device) for _ in "12")
            self._moments = list(zip(self.split(self.first), self.split(self.second), strict=True))
            self.steps = torch.zeros(len(params), dtype=torch.float64, device=device)
            self.lr = torch.zeros((), dtype=torch.float64, device=device)
            # torch's Adam keeps its step counts on the CPU, Pyro's as Python numbers.
            self._counts = list(self.steps) if device.type == "cpu" and not rule.pyro_form else None
            self._taken = [0.0] * len(params)
        self.adopt()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the parameters' shapes."""
        return [part.view(p.shape) for part, p in zip(flat.split(self.sizes), self.params, strict=True)]

    @property
    def state(self) -> list[Tensor]:
        """What a step changes in place: the parameters; with a rule, also moments, counts and rate."""
        return [*self.values, *([self.first, self.second, self.steps, self.lr] if self.rule else [])]

    def stepped(self, state: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """The new state after a gradient, end to end."""
        assert self.rule is not None
        *values, first, second, steps, lr = state
        flat, lr, steps = flatten(values), lr * self.rule.decay, steps + 1.0
        first, second = self.rule.moments(self.rule.gradient(flat, grad), first, second)
        moved = self.rule.move(flat, first, second, steps, lr, self.sizes)
        return [*self.split(moved), first, second, steps, lr]

    @torch.no_grad()
    def step_in_place(self, grad: Tensor, lr: float | None = None) -> None:
        """Takes the step of :meth:`stepped` on the parameters themselves, in few operations.

        :param lr: the learning rate from now on; by default the present one.
        """
        assert self.rule is not None
        if lr is not None:
            self.lr.fill_(lr)
        counts = set(self.steps.tolist())
        if len(counts) != 1 or not self.rule.is_plain:
            for old, new in zip(self.state, self.stepped(self.state, grad), strict=True):
                old.copy_(new)
            return
        self.steps += 1.0
        move = self.rule.change(grad, self.first, self.second, counts.pop() + 1.0, self.lr.item())
        torch._foreach_add_(self.values, self.split(move))

    @torch.no_grad()
    def adopt(self) -> None:
        """Takes over moments and counts that were replaced from outside, and makes them views again."""
        self._groups = [_find_group(o, p) or {} for p, o in zip(self.params, self.optimizers, strict=False)]
        if self.optimizers:
            self._read = operator.itemgetter(*(self._groups[0].keys() - {"params", "lr"}))
            self._seen = [self._read(group) for group in self._groups]
            pairs = zip(self.optimizers, self._groups, strict=True)
            self._fits = all(read_rule(optimizer, group) == self.rule for optimizer, group in pairs)
        for i, (param, optimizer) in enumerate(zip(self.params, self.optimizers, strict=False)):
            param.grad = None
            state = optimizer.state[param]
            for name, view in zip(_MOMENTS, self._moments[i], strict=True):
                if state.get(name) is not view:
                    view.copy_(state.get(name, torch.zeros_like(view)))
                state[name] = view
            self._taken[i] = float(state.get("step", 0))
            self.steps[i] = self._taken[i]
            if self._counts is not None:
                state["step"] = self._counts[i]
            elif "step" not in state:
                state["step"] = 0 if self.rule and self.rule.pyro_form else torch.zeros(())
        self.intact()  # for the learning rate

    def intact(self) -> bool:
        """Whether the moments are still views of this bucket, and counts those of its last step.

        Passes on a learning rate that was changed, if it is still one for all.
        """
        if not self.optimizers:
            return True
        rates = [group["lr"] for group in self._groups]
        if rates[0] != self._lr:
            self.lr.fill_(rates[0])
            self._lr = rates[0]
        if rates.count(rates[0]) != len(rates):
            return False
        states = [
            optimizer.state[param] for param, optimizer in zip(self.params, self.optimizers, strict=True)
        ]
        if self._counts is None and [float(state["step"]) for state in states] != self._taken:
            return False
        return all(
            state.get("exp_avg") is moments[0] for state, moments in zip(states, self._moments, strict=True)
        )

    def in_place(self) -> bool:
        """Whether the parameters are still in the same memory, and of the same kind."""
        return [param.data_ptr() for param in self.params] == self._addresses and all(
            param.dtype == value.dtype for param, value in zip(self.params, self.values, strict=True)
        )

    def follows_rule(self) -> bool:
        """Whether the optimizers' hyperparameters, the learning rate aside, are still those of the rule."""
        if not self.optimizers:
            return True
        pairs = zip(self._groups, self._seen, strict=True)
        return self._fits and all(self._read(group) == seen for group, seen in pairs)

    def seen_gradient(self, first_before: Tensor) -> Tensor:
        """The gradient that the last step's change of the first moment tells of."""
        assert self.rule is not None
        beta1 = self.rule.betas[0]
        return (self.first - beta1 * first_before) / (1.0 - beta1)

    def write(self) -> None:
        """Gives counts and learning rate back to those optimizers that do not share this bucket's tensors."""
        if self.rule is None or self._counts is not None:
            return
        counts, self._lr = self.steps.tolist(), self.lr.item()
        self._taken = counts
        for param, optimizer, group, count in zip(
            self.params, self.optimizers, self._groups, counts, strict=True
        ):
            group["lr"] = self._lr
            state = optimizer.state[param]
            state["step"] = int(count) if self.rule.pyro_form else state["step"].fill_(count)


def make_buckets(params: list[Tensor], optim: Any, fuse: bool = True) -> list[FlatParameters]:
    """Buckets for all parameters: fused where Pyro's optimizer follows a :class:`Rule`, plain otherwise."""
    fused: dict[Any, list[tuple[Tensor, torch.optim.Optimizer]]] = {}
    plain: dict[Any, list[Tensor]] = {}
    for param in params:
        kind = (param.dtype, param.device)
        optimizer = inner_optimizer(optim.optim_objs[param])
        group = _find_group(optimizer, param) or optimizer.param_groups[0]
        rule = read_rule(optimizer, group) if fuse and not optim.grad_clip.get(param) else None
        if rule is None:
            plain.setdefault(kind, []).append(param)
        else:
            key = (*kind, rule, group["lr"])
            fused.setdefault(key, []).append((param, optimizer))
    return [
        *(
            FlatParameters([p for p, _ in pairs], [o for _, o in pairs], key[2])
            for key, pairs in fused.items()
        ),
        *(FlatParameters(members) for members in plain.values()),
    ]


def as_pyro_optim(optim: Any) -> PyroOptim:
    """An optimizer of Pyro's kind, from one of torch's or its class too.

    :raises ValueError: with the remedy, for anything else.
    """
    if isinstance(optim, PyroOptim):
        return optim
    if isinstance(optim, torch.optim.Optimizer):
        return TorchOptim(optim)
    if inspect.isclass(optim) and issubclass(optim, torch.optim.Optimizer):
        return PyroOptim(optim, {})
    if callable(optim) and str(getattr(optim, "__module__", "")).startswith("pyro.optim"):
        name = getattr(optim, "__name__", "Adam")
        raise ValueError(f"optim: expected an instance, got {name} itself; write {name}({{'lr': 0.001}})")
    raise ValueError(f"optim: expected an optimizer of pyro.optim or torch.optim, got {optim!r}")
