"""Adam, AdamW and ClippedAdam on flat tensors, traced into the step and in step with Pyro's optimizers."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.optim.clipped_adam
import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import _load_state_dict
from torch import Tensor

__all__ = ["Bucket", "Rule", "TorchOptim", "make_buckets", "meet"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Rule:
    """The hyperparameters of Adam (Kingma and Ba 2015, algorithm 1) and its variants.

    :param decoupled: weight decay acts on the parameter (Loshchilov and Hutter 2019), not on the gradient.
    :param clip: bound on every entry of the gradient (``pyro.optim.ClippedAdam``).
    :param decay: factor on the learning rate at every step (the same).
    :param centered: the second moment is that of the gradient about its mean (the same).
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool = False
    clip: float = math.inf
    decay: float = 1.0
    centered: bool = False
    pyro_form: bool = False

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

    def move(self, param: Tensor, first: Tensor, second: Tensor, steps: Tensor, lr: Tensor) -> Tensor:
        """The parameter after a step; ``steps`` (all equal) and ``lr`` are float64 and those of this step."""
        beta1, beta2 = self.betas
        if self.weight_decay and self.decoupled:
            param = param * (1.0 - lr * self.weight_decay).to(param.dtype)
        rate = lr / (1.0 - beta1 ** steps[0])
        root = (1.0 - beta2 ** steps[0]).sqrt()
        if self.pyro_form:  # eps is added before the bias correction
            return param - (rate * root).to(param.dtype) * first / (second.sqrt() + self.eps)
        return param - rate.to(param.dtype) * first / (second.sqrt() / root.to(param.dtype) + self.eps)

    def step(self, state: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """The new state of a :class:`Bucket`: parameters, both moments, step counts, learning rate."""
        param, first, second, steps, lr = state
        lr, steps = lr * self.decay, steps + 1.0
        first, second = self.moments(self.gradient(param, grad), first, second)
        return [self.move(param, first, second, steps, lr), first, second, steps, lr]


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
                _load_state_dict(optimizer, state)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, or the one that a scheduler drives."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _find_group(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any] | None:
    return next((g for g in optimizer.param_groups if any(param is p for p in g["params"])), None)


def read_rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule | None:
    """The rule that an optimizer follows for a group of parameters; None if it cannot be fused."""
    kind = type(optimizer)
    if isinstance(group["lr"], Tensor):
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


class Bucket:
    """Parameters of one dtype, device and rule, laid end to end in one tensor of which they become views.

    With a rule, so do the moments in the optimizers' states: eager steps and fused steps can alternate.

    :param params: the parameters, leaves.
    :param optimizers: theirs, in order; None where the step is left to them and only gradients are wanted.
    :param rule: the rule that they share, with learning rate and step count.
    """

    def __init__(
        self,
        params: list[Tensor],
        optimizers: list[torch.optim.Optimizer] | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.params, self.optimizers, self.rule = params, optimizers or [], rule
        self._groups = [_find_group(o, p) or {} for p, o in zip(params, self.optimizers, strict=False)]
        ends = list(itertools.accumulate(p.numel() for p in params))
        self.slices = [slice(end - p.numel(), end) for end, p in zip(ends, params, strict=True)]
        self.flat = torch.cat([p.detach().reshape(-1) for p in params])
        self.views = self.split(self.flat)
        self._addresses = [view.data_ptr() for view in self.views]
        self._lr = math.nan
        if rule is not None:
            device = self.flat.device
            self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
            self._moments = list(zip(self.split(self.first), self.split(self.second), strict=True))
            self.steps = torch.zeros(len(params), dtype=torch.float64, device=device)
            self.lr = torch.zeros((), dtype=torch.float64, device=device)
            # torch's Adam keeps its step counts on the CPU, Pyro's as Python numbers.
            self._counts = list(self.steps) if device.type == "cpu" and not rule.pyro_form else None
        self.adopt()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the parameters' shapes."""
        return [flat[s].view(p.shape) for s, p in zip(self.slices, self.params, strict=True)]

    @property
    def state(self) -> list[Tensor]:
        """What a step changes in place, values first."""
        return [self.flat, self.first, self.second, self.steps, self.lr] if self.rule else [self.flat]

    @torch.no_grad()
    def adopt(self) -> None:
        """Takes over values and moments that were replaced from outside, and makes them views again."""
        for param, view, address in zip(self.params, self.views, self._addresses, strict=True):
            if param.data_ptr() != address:
                view.copy_(param)
                param.data = view
        for i, (param, optimizer) in enumerate(zip(self.params, self.optimizers, strict=False)):
            param.grad = None
            state = optimizer.state[param]
            for name, view in zip(_MOMENTS, self._moments[i], strict=True):
                if state.get(name) is not view:
                    view.copy_(state.get(name, torch.zeros_like(view)))
                state[name] = view
            count = state.get("step", 0)
            self.steps[i] = float(count)
            if self._counts is not None:
                state["step"] = self._counts[i]
            elif "step" not in state:
                state["step"] = 0 if self.rule and self.rule.pyro_form else torch.zeros(())
        self.intact()  # for the learning rate

    def intact(self) -> bool:
        """Whether parameters and moments are still views of this bucket, with one learning rate and count.

        Passes on a learning rate that was changed.
        """
        if [param.data_ptr() for param in self.params] != self._addresses:
            return False
        if not self.optimizers:
            return True
        rates = [group["lr"] for group in self._groups]
        if rates[0] != self._lr:
            self.lr.fill_(rates[0])
            self._lr = rates[0]
        return rates.count(rates[0]) == len(rates) and all(
            optimizer.state[param].get("exp_avg") is moments[0]
            for param, optimizer, moments in zip(self.params, self.optimizers, self._moments, strict=True)
        )

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
        for param, optimizer, group, count in zip(
            self.params, self.optimizers, self._groups, counts, strict=True
        ):
            group["lr"] = self._lr
            state = optimizer.state[param]
            state["step"] = int(count) if self.rule.pyro_form else state["step"].fill_(count)


def make_buckets(params: list[Tensor], optim: Any) -> list[Bucket]:
    """Buckets for all parameters: fused where Pyro's optimizer follows a :class:`Rule`, plain otherwise."""
    fused: dict[Any, list[tuple[Tensor, torch.optim.Optimizer]]] = {}
    plain: dict[Any, list[Tensor]] = {}
    for param in params:
        kind = (param.dtype, param.device)
        optimizer = inner_optimizer(optim.optim_objs[param])
        group = _find_group(optimizer, param) or optimizer.param_groups[0]
        rule = None if optim.grad_clip.get(param) else read_rule(optimizer, group)
        if rule is None:
            plain.setdefault(kind, []).append(param)
        else:
            count = float(optimizer.state[param].get("step", 0))
            key = (*kind, rule, group["lr"], count)
            fused.setdefault(key, []).append((param, optimizer))
    return [
        *(Bucket([p for p, _ in pairs], [o for _, o in pairs], key[2]) for key, pairs in fused.items()),
        *(Bucket(members) for members in plain.values()),
    ]
