"""The priors of a model's latents given those before them, as recorded graphs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .._program.packing import Packing
from .._program.priors import read_priors
from .._types import Program
from .errors import CannotCompile
from .log_density import batch_memory
from .simplify import memory_of, written
from .trace import trace

__all__ = ["PriorGraph", "no_priors", "record_priors"]

Located = tuple[Tensor, Tensor]
"""Location and scale of a site's prior for each of P points."""


@dataclass
class PriorGraph:
    """Location and scale of each prior that has them, as functions of the latents, for many points at once.

    It holds what the model reached when it was recorded.  Parameters of the model are read at every call.

    :param graph: of one point; its inputs are the constants, then the latents.
    :param constants: by reference.
    :param inputs: the latents in their order.
    :param joint: of each site that has such a prior whether its numbers depend on each other.
    :param like: of the dtype and on the device that the latents had.
    """

    graph: fx.GraphModule
    constants: list[Tensor]
    inputs: list[str]
    joint: Mapping[str, bool]
    like: Tensor

    def __getstate__(self) -> dict[str, Any]:
        nodes = [
            (
                node.name,
                node.op,
                _as_text(node.target),
                *fx.node.map_arg((node.args, node.kwargs), _Reference.to),
            )
            for node in self.graph.graph.nodes
        ]
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "graph": nodes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nodes, made = fx.Graph(), dict[str, fx.Node]()
        for name, op, target, args, kwargs in state["graph"]:
            args, kwargs = pytree.tree_map_only(_Reference, lambda one: made[one.name], (args, kwargs))
            made[name] = nodes.create_node(op, _as_target(target), args, kwargs, name)
        self.__dict__.update({**state, "graph": fx.GraphModule(torch.nn.Module(), nodes)})

    def __deepcopy__(self, memo: Any) -> "PriorGraph":
        return self  # it is never changed, and its constants are the model's own

    @cached_property
    def _writes(self) -> "_Writes":
        return _writes_of(self.graph.graph)

    @cached_property
    def parents(self) -> dict[str, frozenset[str]]:
        """The latents that each prior is computed from."""
        *_, output = self.graph.graph.nodes
        latents = list(self.graph.graph.find_nodes(op="placeholder"))[len(self.constants) :]
        names = dict(zip(latents, self.inputs, strict=True))
        results = list(output.args[0])
        pairs = zip(results[::2], results[1::2], strict=True)
        return {
            site: frozenset(names[node] for node in _sources(pair, self._writes) if node in names)
            for site, pair in zip(self.joint, pairs, strict=True)
        }

    def only(self, sites: Sequence[str]) -> tuple[list[str], Callable[..., list[Located]]]:
        """The part that some sites' priors need.

        :return: the latents that they need; a function of their values, each ``(P, *free_shape)``.
        """
        *_, output = self.graph.graph.nodes
        everything = list(output.args[0])
        places = [list(self.joint).index(site) for site in sites]
        results = [everything[2 * i + part] for i in places for part in (0, 1)]
        kept = _sources(results, self._writes)
        nodes, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.graph.nodes:
            if node in kept:
                copies[node] = nodes.node_copy(node, copies.__getitem__)
        nodes.output(tuple(copies[node] for node in results))
        inputs = list(self.graph.graph.find_nodes(op="placeholder"))
        constants = [value for value, node in zip(self.constants, inputs, strict=False) if node in kept]
        latents = zip(self.inputs, inputs[len(self.constants) :], strict=True)
        needed = [name for name, node in latents if node in kept]
        graph = fx.GraphModule(torch.nn.Module(), nodes)
        run = (batch_memory(graph) if needed else graph).forward
        return needed, partial(_many, run, constants, self.like)


@dataclass(frozen=True)
class _Reference:
    """A node in a pickle."""

    name: str

    @classmethod
    def to(cls, node: fx.Node) -> Any:
        return cls(node.name)


def _as_text(target: Any) -> Any:
    """An operation of torch as its name, since it cannot be pickled itself."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace, target._opname, target._overloadname
    return target


def _as_target(target: Any) -> Any:
    if not isinstance(target, tuple):
        return target
    namespace, name, overload = target
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _many(run: Callable[..., Any], constants: Sequence[Tensor], like: Tensor, *free: Tensor) -> list[Located]:
    one = partial(run, *constants)
    free = tuple(value.to(like) for value in free)
    if free and not len(free[0]):
        return [
            (loc[:0], scale[:0])
            for loc, scale in _many(run, constants, like, *(v.new_zeros(1, *v.shape[1:]) for v in free))
        ]
    # Without a latent there is nothing to batch: all points have the same priors.
    found = torch.vmap(one)(*free) if free else tuple(value.unsqueeze(0) for value in one())
    return list(zip(found[::2], found[1::2], strict=True))


_Writes = Mapping[fx.Node, list[tuple[int, fx.Node]]]


def _writes_of(nodes: fx.Graph) -> _Writes:
    """By the node that made a piece of memory, those that write into it, with their places in the graph."""
    writes: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
    for i, node in enumerate(nodes.nodes):
        for value in written(node):
            writes.setdefault(memory_of(value), []).append((i, node))
    return writes


def _sources(results: Any, writes: _Writes) -> set[fx.Node]:
    """The nodes that results are computed from, earlier writes into their memory included."""
    seen, pending = set[fx.Node](), list(results)
    places = {node: i for i, node in enumerate(pending[0].graph.nodes)} if pending and writes else {}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
            for value in node.all_input_nodes if writes else ():
                earlier = writes.get(memory_of(value), ())
                pending.extend(write for place, write in earlier if place < places[node])
    return seen


def _keep_only(nodes: fx.Graph, kept: set[fx.Node]) -> None:
    for node in reversed(list(nodes.nodes)):
        if node.op == "call_function" and node not in kept:
            nodes.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _is_unsteady(node: fx.Node) -> bool:
    """Whether a value is not a function of the latents alone, or has an effect each time it is computed."""
    return _is_random(node) or _counts_batches(node)


def _counts_batches(node: fx.Node) -> bool:
    # A batch norm in training writes into its running statistics, which its schema does not say.
    if "batch_norm" not in str(node.target) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("training") is True and given.get("running_mean") is not None


def no_priors(latents: Iterable[str], start: Tensor) -> PriorGraph:
    """The graph of a model of which no prior is known."""
    nodes, names = fx.Graph(), list(latents)
    for name in names:
        nodes.placeholder(f"latent_{names.index(name)}")
    nodes.output(())
    return PriorGraph(fx.GraphModule(torch.nn.Module(), nodes), [], names, {}, start.detach()[:0])


def record_priors(
    model: Program, args: Any, kwargs: Mapping[str, Any], packing: Packing, start: Tensor
) -> PriorGraph:
    """Records the priors of a model.

    What is drawn on the way, such as a discrete latent, makes the priors after it unknown; so does a batch
    norm in training, which counts every run and couples the rows.

    :param packing: the latents.
    :param start: a point at which the model is run, ``(D,)``.
    :raises CannotCompile: if the program does what a graph cannot hold, or differs from call to call.
    """
    latents, free = packing.latents, packing.split(start)
    joint: dict[str, bool] = {}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        found = read_priors(model, args, kwargs, packing, dict(zip(latents, values, strict=True)))
        known = {name: found[name] for name in latents if name in found}
        joint.clear()
        joint.update({name: prior.joint for name, prior in known.items()})
        return tuple(value for prior in known.values() for value in (prior.loc, prior.scale))

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        traced = trace(run, [], list(free.values()))
    if traced.pinned_args:
        raise CannotCompile("what the model does depends on the values of its latents", traced.read_at)
    *_, output = traced.graph.graph.nodes
    results, names = list(output.args[0]), list(joint)
    writes = _writes_of(traced.graph.graph)
    steady = [
        i
        for i in range(len(names))
        if not any(map(_is_unsteady, _sources(results[2 * i : 2 * i + 2], writes)))
    ]
    output.args = (tuple(results[2 * i + part] for i in steady for part in (0, 1)),)
    _keep_only(traced.graph.graph, _sources(output.args[0], writes))
    known = {names[i]: joint[names[i]] for i in steady}
    return PriorGraph(traced.graph, traced.constants, list(latents), known, start.detach()[:0])
