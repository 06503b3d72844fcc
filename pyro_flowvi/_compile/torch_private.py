"""Every private name of torch that tracing and machine code use, and the versions on which they were tried.

There is no gate by version: a newer torch is tried, its steps are compared with eager ones as always, and
where a name is gone or fails, steps stay eager, with one :class:`CompileWarning` that says so.  The public
entry that may replace them one day is ``torch.compile``, which today neither traces through Pyro's handlers
nor takes a graph without its own guards, at 0.2 ms a call.
"""

from importlib import import_module
from typing import Any, Final

import torch

from .errors import CannotCompile

__all__ = ["TRIED", "private"]

TRIED: Final = {
    # There Inductor fuses the gradients of two networks wrongly; the comparison leaves those steps eager.
    "2.11": "tests/_compile: all pass but maf's and one continuously-indexed flow's machine code",
    "2.12": "the short suite of noxfile.py: traced and interpreted steps, machine code",
    "2.13": "the whole suite; CUDA graphs on an H100",
    "2.14": "tests/_compile and tests/init; on Python 3.12 and 3.13 the short suite",
}
"""Version of torch -> what was run on it, on the CPU where nothing else is said."""

_INDUCTOR = "torch._inductor"
_PLACES: Final = {
    # what vmap runs in a loop, which is still faster than Pyro
    "_set_vmap_fallback_warning_enabled": "torch._C._functorch",
    # machine code
    "make_fx": "torch.fx.experimental.proxy_tensor",
    "fx_graph_cse": "torch._functorch.compile_utils",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "ShapeEnv": "torch.fx.experimental.symbolic_shapes",
    "TracingContext": "torch._guards",
    "tracing": "torch._guards",
    "config": f"{_INDUCTOR}.config",
    "lowering": f"{_INDUCTOR}.lowering",
    "select_decomp_table": f"{_INDUCTOR}.decomposition",
    "compile_fx_inner": f"{_INDUCTOR}.compile_fx",
    "constant_fold_uniform_value": f"{_INDUCTOR}.fx_passes.joint_graph",
    "post_grad": f"{_INDUCTOR}.fx_passes.post_grad",
    "preserve_node_ordering": f"{_INDUCTOR}.fx_passes.control_dependencies",
    "control_deps": f"{_INDUCTOR}.fx_passes.control_dependencies",
    "DispatchKey": "torch._C",
    "OrderedSet": "torch.utils._ordered_set",
    "remove_noop_ops": f"{_INDUCTOR}.fx_passes.post_grad",
    "V": f"{_INDUCTOR}.virtualized",
    "CppPythonBindingsCodeCache": f"{_INDUCTOR}.codecache",
    "VecISA": f"{_INDUCTOR}.cpu_vec_isa",
    "DtypePropagationOpsHandler": f"{_INDUCTOR}.dtype_propagation",
    "get_cpp_compiler": f"{_INDUCTOR}.cpp_builder",
    "InvalidCxxCompiler": f"{_INDUCTOR}.exc",
}


def private(name: str) -> Any:
    """A private function, class or module of torch.

    :raises CannotCompile: if this torch does not have it.

    Example::

        >>> private("make_fx").__name__
        'make_fx'
    """
    place = _PLACES[name]
    try:
        module = import_module(place)
        return module if place.endswith(f".{name}") else getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise CannotCompile(
            f"torch {torch.__version__} has no {place}.{name}; tried were {', '.join(TRIED)}"
        ) from error
