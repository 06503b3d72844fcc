"""Lowering a graph to machine code."""

import contextlib
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._types import Program
from .before_expand import compute_before_expand
from .errors import CannotCompile, brief
from .inductor_cuda_graph import cuda_graph
from .inductor_fixed_memory import with_fixed_memory
from .inductor_savings import fast_inductor
from .small_algebra import WRITTEN_OUT
from .torch_private import private
from .trace import _RANDOM

__all__ = ["lower", "warm_up"]

PARALLEL_FROM = 2**15
"""A graph without a tensor of that many elements runs on one thread: a second costs more than it does."""


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's table; random draws stay what they are eagerly, so that a seed means the same."""
    all_rules = private("select_decomp_table")()
    table = {op: rule for op, rule in all_rules.items() if _RANDOM not in getattr(op, "tags", ())}
    return table | WRITTEN_OUT


def _functional_graph(function: Callable[..., Any], inputs: Sequence[Tensor], fake: Any) -> fx.GraphModule:
    """The function in Inductor's operations, free of mutation but for copies into its inputs at the end."""
    make_fx, fx_graph_cse = private("make_fx"), private("fx_graph_cse")
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
    lowering = private("lowering")
    for node in nodes.nodes:
        if _RANDOM in getattr(node.target, "tags", ()):
            if node.target not in lowering.lowerings:
                lowering.make_fallback(node.target, warn=False, override_decomp=True)
            lowering.add_layout_constraint(node.target, lowering.constrain_to_fx_strides)


def _chain_draws(nodes: fx.Graph) -> None:
    """Keeps random operations in the program's order where Inductor, before torch 2.13, does not."""
    if hasattr(private("post_grad"), "_chain_random_ops_for_ordering"):
        return
    draws = [node for node in nodes.nodes if _RANDOM in getattr(node.target, "tags", ())]
    if len(draws) > 1:
        before = {later: private("OrderedSet")([earlier]) for earlier, later in itertools.pairwise(draws)}
        _complete_control_deps()
        private("preserve_node_ordering")(nodes, before)


def _complete_control_deps() -> None:
    """Has torch 2.11 run the operator that orders others, as later ones do: its fake kernel is all it has."""
    operator, keys = private("control_deps"), private("DispatchKey")
    for key in (keys.CompositeExplicitAutograd, keys.Autograd):
        if key not in operator.py_kernels:
            operator.py_impl(key)(lambda _, subgraph, *args, **kwargs: subgraph(*args, **kwargs))


def _largest(graph: fx.GraphModule) -> int:
    """Number of elements of the largest tensor in a graph."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=0)


@functools.cache
def warm_up() -> threading.Thread:
    """Compiles an empty kernel in the background, and with it, once a machine, what all kernels include."""

    def compile_nothing() -> None:
        source = """#include <torch/csrc/inductor/cpp_prefix.h>
        extern "C" void kernel(float* x) { x[0] = 0.0f; }"""
        # A failure here is met again, and reported, by the first kernel.
        with contextlib.suppress(Exception), fast_inductor():
            private("CppPythonBindingsCodeCache").load_pybinding(["float*"], source)

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
    config = private("config")
    tracing, context = private("tracing"), private("TracingContext")
    _check_compiler(inputs)
    errors = []
    # Once more without what may have gone wrong: assumed instructions, a header that was deleted meanwhile.
    for saving in (True, False):
        try:
            # Without a ShapeEnv, Inductor's disk cache is bypassed.
            fake = private("FakeTensorMode")(allow_non_fake_inputs=True, shape_env=private("ShapeEnv")())
            options = {} if saving else {"cpp_cache_precompile_headers": False}
            patched = config.patch({"fallback_random": True, **options})
            savings = fast_inductor() if saving else contextlib.nullcontext()
            with patched, savings, tracing(context(fake)), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about itself
                graph = _functional_graph(function, inputs, fake)
                stand_ins = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
                threads = 1 if _largest(graph) < PARALLEL_FROM else -1
                with private("V").set_fake_mode(fake), config.patch({"cpp.threads": threads}):
                    private("remove_noop_ops")(graph.graph)
                    private("constant_fold_uniform_value")(graph)
                    graph = compute_before_expand(graph)
                    _chain_draws(graph.graph)
                    compiled = private("compile_fx_inner")(graph, stand_ins, is_inference=True)
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
            step = with_fixed_memory(compiled.source_code, call.__globals__, inputs, num_static)
    elif devices == {"cuda"}:
        with contextlib.suppress(RuntimeError):
            step = cuda_graph(compiled, inputs, num_static)
    return step or (lambda *arguments: compiled([*static, *arguments]))


def _check_compiler(inputs: Sequence[Tensor]) -> None:
    if all(value.device.type == "cpu" for value in inputs):
        missing = private("InvalidCxxCompiler")
        try:
            private("get_cpp_compiler")()
        except missing as error:
            raise CannotCompile(
                "no C++ compiler was found: install g++ (Debian: apt install g++) or clang++ (macOS: "
                "xcode-select --install), or name one in the environment variable CXX"
            ) from error
