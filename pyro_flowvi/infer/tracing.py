"""Tracing a step into a graph and lowering it to machine code.

All use of torch's private interfaces is in this file: ``make_fx``, functionalization and Inductor.  The
public entry that may replace them one day is ``torch.compile`` (``torch.compiler``), which today neither
traces through Pyro's handlers nor takes a graph without its own guards, at 0.2 ms a call.
"""

import contextlib
import functools
import itertools
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .cause import CannotCompile, brief, stack_inside, user_line
from .cuda import cuda_graph
from .replay import replay

__all__ = ["UNSUPPORTED_TORCH", "Traced", "lower", "trace", "warm_up"]

MIN_TORCH, MAX_TORCH = (2, 11), (2, 13)
_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
UNSUPPORTED_TORCH = (
    None
    if MIN_TORCH <= _TORCH <= MAX_TORCH
    else f"torch {torch.__version__} is not among the supported versions, "
    f"{'.'.join(map(str, MIN_TORCH))} to {'.'.join(map(str, MAX_TORCH))}"
)

PARALLEL_FROM = 2**15
"""A graph without a tensor of that many elements runs on one thread: a second costs more than it does."""
SMALL_PRODUCT = 2**14
"""Matrix products of fewer multiplications are written as sums, which fuse with their surroundings."""

Program = Callable[..., Any]

aten = torch.ops.aten
_RANDOM = torch.Tag.nondeterministic_seeded
_DYNAMIC_SHAPE = torch.Tag.dynamic_output_shape
_MASKS = (torch.bool, torch.uint8)
_VALIDATION = {"_validate_sample", "warn_if_nan", "warn_if_inf"}
"""Functions of torch and Pyro that read values and only complain about them."""


@dataclass
class Traced:
    """A graph of ``(parameters, constants, arguments) -> outputs`` on static shapes.

    :param graph: its placeholders are the parameters, then the constants, then the arguments.
    :param constants: tensors that the program reached otherwise than as an argument, by reference.
    :param pinned: constants and arguments whose *values* the trace holds, with the version they had.
    """

    graph: fx.GraphModule
    constants: list[Tensor]
    pinned: list[tuple[Tensor, int]] = field(default_factory=list)
    pinned_args: list[tuple[int, Tensor, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)


class _Watch(TorchDispatchMode):
    """Refuses what a graph of static shapes cannot hold: values read by Python, shapes that depend on values.

    A value that is a function of constants and arguments alone may be read: the graph then holds for those
    very tensors, as long as they are not changed.  So may what torch's own validation reads.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self._params = {id(p) for p in params}
        self.read: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = (
            [i for i in args[1] if i is not None and i.dtype in _MASKS] if func is aten.index.Tensor else []
        )
        if func is aten._local_scalar_dense.default:
            self._note_reading(
                args[0], "a value that depends on {} is read by Python (.item(), float(), an if)"
            )
        elif masks:
            for mask in masks:
                self._note_reading(mask, "the shape of a result depends on {} (boolean indexing)")
            with _disable_current_modes():
                places = [
                    i.nonzero(as_tuple=True) if i is not None and i.dtype in _MASKS else (i,) for i in args[1]
                ]
            return func(args[0], list(itertools.chain(*places)))
        elif func is not aten.index.Tensor and (_DYNAMIC_SHAPE in func.tags or func is aten.equal.default):
            for value in args:
                if isinstance(value, Tensor):
                    what = (
                        f"the result of {func.overloadpacket.__name__} depends on {{}}, and on it what runs"
                    )
                    self._note_reading(value, what)
        else:
            if torch.Tag.inplace in func.tags and _RANDOM in func.tags and not args[0].is_contiguous():
                # Drawn in the order of memory, which a graph without mutation would not keep.
                order = sorted(range(args[0].dim()), key=args[0].stride, reverse=True)
                func(args[0].permute(order), *args[1:], **(kwargs or {}))
                return args[0]
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))

    def _note_reading(self, value: Tensor, cause: str) -> None:
        """Notes the tensors that a value is a function of; refuses parameters and random draws among them."""
        from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

        names = {frame.f_code.co_name for frame, _ in itertools.islice(traceback.walk_stack(None), 12)}
        if not names.isdisjoint(_VALIDATION):
            return
        mode: Any = get_proxy_mode()
        slot = get_proxy_slot(value, mode.tracer, None)
        read, culprit = set[Any](), None
        if slot is None:
            culprit = "parameters" if id(value) in self._params else None
            read.add(value)
        pending, seen = [] if slot is None else [slot.proxy.node], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            pending.extend(node.all_input_nodes)
            if node.op == "placeholder":
                read.add(node.name)
            elif node.op == "get_attr":
                tensor = getattr(mode.tracer.root, str(node.target), None)
                culprit = "parameters" if tensor is None or id(tensor) in self._params else culprit
                read.add(tensor)
            elif isinstance(node.target, torch._ops.OpOverload):
                changed = node.args[0] if node.target._schema.is_mutable and node.args else None
                if isinstance(changed, fx.Node) and changed.op in ("get_attr", "placeholder"):
                    culprit = culprit or "what the program changes in place"
                if _RANDOM in node.target.tags:
                    culprit = culprit or "random draws"
        if culprit:
            raise CannotCompile(cause.format(culprit), user_line(stack_inside(trace.__code__)))
        self.read |= read


def trace(function: Callable[..., Any], params: Sequence[Tensor], args: Sequence[Tensor]) -> Traced:
    """Traces a function of tensors that also reaches parameters and other tensors on its own.

    :param function: called once with stand-ins for ``args``; returns a tuple of tensors.
    :param params: leaf tensors that become inputs.
    :param args: example arguments.
    :raises CannotCompile: if the function does what a graph cannot hold.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # Another object over the same memory: what the program reaches by itself must not pass for an argument.
    stand_ins = [arg.detach() for arg in args]
    watch = _Watch(params)

    def watched(*inputs: Tensor) -> Any:
        with watch:
            return function(*inputs)

    try:
        graph = make_fx(watched)(*stand_ins)
    except CannotCompile as error:
        while isinstance(error.__cause__, CannotCompile):  # Pyro's handlers raise copies with shapes appended
            error = error.__cause__
        raise error from None
    except Exception as error:
        stack = traceback.extract_tb(error.__traceback__)
        reason = str(error).strip().splitlines() or [""]
        raise CannotCompile(
            f"tracing failed with {type(error).__name__}: {reason[0]}", user_line(stack)
        ) from error
    return _lift(graph, params, args, watch.read)


def _lift(graph: fx.GraphModule, params: Sequence[Tensor], args: Sequence[Tensor], read: set[Any]) -> Traced:
    """Makes parameters and constants inputs of the graph, ahead of its arguments."""
    nodes, constants = graph.graph, list[Tensor]()
    by_id = {id(p): i for i, p in enumerate(params)}
    by_memory = {(p.data_ptr(), p.shape, p.stride()): i for i, p in enumerate(params) if p.numel()}
    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    first = next(node for node in nodes.nodes if node.op != "get_attr")
    with nodes.inserting_before(first):
        inputs = [nodes.placeholder(f"param_{i}") for i in range(len(params))]
    lifted: dict[int, fx.Node] = {}
    for node in [node for node in nodes.nodes if node.op == "get_attr"]:
        value = getattr(graph, node.target)
        index = by_id.get(id(value), by_memory.get((value.data_ptr(), value.shape, value.stride())))
        if index is not None:
            replacement = inputs[index]
        elif id(value) in lifted:
            replacement = lifted[id(value)]
        else:
            with nodes.inserting_before(first):
                replacement = nodes.placeholder(f"constant_{len(constants)}")
            lifted[id(value)] = replacement
            constants.append(value)
        node.replace_all_uses_with(replacement)
        nodes.erase_node(node)
    nodes.eliminate_dead_code()
    nodes.lint()
    names = {node.name: i for i, node in enumerate(placeholders)}
    pinned_args = [
        (names[name], args[names[name]], args[names[name]]._version) for name in read if isinstance(name, str)
    ]
    pinned = [(value, value._version) for value in read if isinstance(value, Tensor)]
    graph = fx.GraphModule(torch.nn.Module(), nodes)
    return Traced(graph, [c.detach() for c in constants], pinned, pinned_args)


def _product(left: Tensor, right: Tensor) -> Any:
    """mm and bmm as a sum of products."""
    if left.numel() * right.shape[-1] > SMALL_PRODUCT:
        return NotImplemented
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _product_vector(left: Tensor, right: Tensor) -> Any:
    return (left * right).sum(-1)


def _add_product(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _product(left, right)
    return product if product is NotImplemented else beta * bias + alpha * product


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's table; random draws stay what they are eagerly, so that a seed means the same."""
    from torch._inductor.decomposition import select_decomp_table

    table = {op: rule for op, rule in select_decomp_table().items() if _RANDOM not in getattr(op, "tags", ())}
    table |= dict.fromkeys((aten.mm.default, aten.bmm.default), _product)
    table |= dict.fromkeys((aten.mv.default, aten.dot.default), _product_vector)
    table |= dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _add_product)
    return table


def _functional_graph(function: Callable[..., Any], inputs: Sequence[Tensor], fake: Any) -> fx.GraphModule:
    """The function in Inductor's operations, free of mutation but for copies into its inputs at the end."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch.fx.experimental.proxy_tensor import make_fx

    stand_ins = [fake.from_tensor(value, static_shapes=True) for value in inputs]
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(function), _decompositions(), tracing_mode="fake")(
            *stand_ins
        )
    graph.graph.eliminate_dead_code()
    _keep_draws(graph.graph)
    return fx.GraphModule(graph, fx_graph_cse(graph.graph))


def _keep_draws(nodes: fx.Graph) -> None:
    """Lets Inductor call random operations as they are, on memory laid out as it is eagerly.

    The order in which entries are drawn is that of memory.
    """
    from torch._inductor import lowering

    for node in nodes.nodes:
        if _RANDOM in getattr(node.target, "tags", ()):
            if node.target not in lowering.lowerings:
                lowering.make_fallback(node.target, warn=False, override_decomp=True)
            lowering.add_layout_constraint(node.target, lowering.constrain_to_fx_strides)


def _largest(graph: fx.GraphModule) -> int:
    """Number of elements of the largest tensor in a graph."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=0)


_FAST = {"cpp.vec_isa_ok": True, "pattern_matcher": False}
"""Options of Inductor that save seconds: the vector instructions that the processor reports are taken for
good, where it would compile and load a probe for each; and none of its patterns is in these graphs."""


@functools.cache
def warm_up() -> threading.Thread:
    """Compiles an empty kernel in the background, and with it, once a machine, what all kernels include."""

    def compile_nothing() -> None:
        from torch._inductor import config
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        source = """#include <torch/csrc/inductor/cpp_prefix.h>
        extern "C" void kernel(float* x) { x[0] = 0.0f; }"""
        # A failure here is met again, and reported, by the first kernel.
        with contextlib.suppress(Exception), config.patch(_FAST):
            CppPythonBindingsCodeCache.load_pybinding(["float*"], source)

    thread = threading.Thread(target=compile_nothing, name="pyro_flowvi-warm-up", daemon=True)
    thread.start()
    return thread


def lower(function: Callable[..., Any], inputs: Sequence[Tensor], num_static: int) -> Program:
    """Machine code for a function of tensors that may change its inputs in place.

    :param function: from tensors to a tuple of tensors, free of Python that depends on values.
    :param inputs: example inputs, all distinct.
    :param num_static: how many inputs, from the first, are these very tensors at every call.
    :return: a callable of the remaining inputs, in the shapes, strides and dtypes of the examples.  Its
        outputs may be overwritten by the next call.  Random draws come from torch's own generators, in the
        order in which the function makes them.
    :raises CannotCompile: where Inductor or the compiler fail, or there is no compiler.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import constant_fold_uniform_value
    from torch._inductor.fx_passes.post_grad import remove_noop_ops
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _check_compiler(inputs)
    # Without a ShapeEnv, Inductor's disk cache is bypassed.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    errors = []
    # Once more without what may have gone wrong: assumed instructions, a header that was deleted meanwhile.
    for options in (_FAST, {"cpp_cache_precompile_headers": False}):
        patched = config.patch({"fallback_random": True, **options})
        try:
            with patched, tracing(TracingContext(fake)), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about itself
                graph = _functional_graph(function, inputs, fake)
                stand_ins = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
                threads = 1 if _largest(graph) < PARALLEL_FROM else -1
                with V.set_fake_mode(fake), config.patch({"cpp.threads": threads}):
                    remove_noop_ops(graph.graph)
                    constant_fold_uniform_value(graph)
                    compiled = compile_fx_inner(graph, stand_ins, is_inference=True)
            return _callable(compiled, inputs, num_static)
        except Exception as error:
            errors.append(error)
    raise CannotCompile(f"Inductor failed with {brief(errors[-1])}") from errors[-1]


def _callable(compiled: Any, inputs: Sequence[Tensor], num_static: int) -> Program:
    """The compiled code as a function of the inputs that vary, with as little work around it as possible."""
    static = list(inputs[:num_static])
    devices = {value.device.type for value in inputs}
    step: Program | None = None
    if devices == {"cpu"}:
        with contextlib.suppress(SyntaxError, AttributeError, NameError):
            call = getattr(compiled.current_callable, "__func__", compiled.current_callable)
            step = replay(compiled.source_code, call.__globals__, inputs, num_static)
    elif devices == {"cuda"}:
        with contextlib.suppress(RuntimeError):
            step = cuda_graph(compiled, inputs, num_static)
    return step or (lambda *arguments: compiled([*static, *arguments]))


def _check_compiler(inputs: Sequence[Tensor]) -> None:
    if all(value.device.type == "cpu" for value in inputs):
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise CannotCompile(
                "no C++ compiler was found: install g++ (Debian: apt install g++) or clang++ (macOS: "
                "xcode-select --install), or name one in the environment variable CXX"
            ) from error
