"""The reference: which members a class's page has, and where references of docstrings lead."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

from pyro_flowvi import AutoFlow
from pyro_flowvi.autoguide._protocol import FitGuide

PACKAGE = "pyro_flowvi"
DESCRIPTORS = (property, classmethod, staticmethod)
INTERNAL = {"announce", "extra_repr", "take_name"}
ASKED_BY_FIT = INTERNAL | {
    *vars(FitGuide),
    *("covers_modes", "draw_roots", "draw_roots_and_log_prob", "place_at", "serves_rows"),
    *("page_flow", "params_of_page", "params_of_roots", "start_rows"),
}
"""Members of guides with which ``fit`` and ``diagnose`` work, and nobody else."""


def is_private(cls: type) -> bool:
    """Whether a class has no page: a name on the way to it begins with an underscore."""
    return any(part.startswith("_") for part in (*cls.__module__.split("."), cls.__name__))


@cache
def attribute_docs(module: str) -> dict[tuple[str, str], list[str]]:
    """Docstrings of attributes, which stand after them in the source."""
    return ModuleAnalyzer.for_module(module).find_attr_docs()


def page_owners(cls: type) -> list[type]:
    """The class, and the private ones that it is built from; members behind a public one are on its page."""
    line = [owner for owner in cls.__mro__ if owner.__module__.startswith(PACKAGE)]
    public = [owner for owner in line if owner is not cls and not is_private(owner)]
    return [o for o in line if o is cls or (is_private(o) and not any(issubclass(p, o) for p in public))]


def public_members(fullname: str) -> list[str]:
    """Documented members of a class: its own, and those of private classes that it is built from."""
    module, _, name = fullname.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    found: dict[str, None] = {}
    for owner in page_owners(cls):
        documented = attribute_docs(owner.__module__)
        for member, value in vars(owner).items():
            has_doc = inspect.getdoc(value) if callable(value) or isinstance(value, DESCRIPTORS) else None
            if not member.startswith("_") and (has_doc or (owner.__qualname__, member) in documented):
                found.setdefault(member)
    hidden = ASKED_BY_FIT if issubclass(cls, AutoFlow) else INTERNAL
    return [member for member in found if member not in hidden]


def process_bases(app: Any, name: str, obj: type, options: Any, bases: list[Any]) -> None:
    """Sphinx' event: the line of bases, with the public ancestors of private ones in their place."""
    public: list[Any] = []
    for base in bases:
        line = inspect.getmro(base) if inspect.isclass(base) else (base,)
        first = next(
            c for c in line if not (str(getattr(c, "__module__", "")).startswith(PACKAGE) and is_private(c))
        )
        if first not in public and first is not object:
            public.append(first)
    bases[:] = public or [object]


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx' event: a value has the docstring that stands after it where it is defined, or none."""
    if what != "data":
        return
    short, package = name.rpartition(".")[2], name.rpartition(".")[0]
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        if vars(sys.modules[module]).get(short) is obj and ("", short) in attribute_docs(module):
            lines[:] = attribute_docs(module)["", short]
            return
    raise ValueError(f"{name}: expected a docstring after the value")


def owners(node: Any) -> Iterator[str]:
    """The class on whose page a reference stands, and the classes that this is derived from."""
    module, name = node.get("py:module"), node.get("py:class")
    if module and name:
        cls = getattr(importlib.import_module(module), name, None)
        yield from (ancestor.__name__ for ancestor in getattr(cls, "__mro__", ()))


def missing_reference(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Sphinx' event: a name without its module, or one by the module that defines it."""
    if node.get("refdomain") != "py":
        return None
    known = env.get_domain("py").objects
    parts = node["reftarget"].split(".")
    endings = [f"{owner}.{node['reftarget']}" for owner in owners(node)]
    endings += [".".join(parts[i:]) for i in range(len(parts)) if not i or is_module(".".join(parts[:i]))]
    for ending in endings:
        matches = [name for name in known if name.endswith(f".{ending}") and not known[name].aliased]
        if len(matches) == 1:
            found = known[matches[0]]
            return make_refnode(
                app.builder, node["refdoc"], found.docname, found.node_id, contnode, matches[0]
            )
    return None


@cache
def is_module(name: str) -> bool:
    """Whether this is a module of the package."""
    if not name.startswith(PACKAGE):
        return False
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-bases", process_bases)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("missing-reference", missing_reference)
    app.config.autosummary_context = {"public_members": public_members}
    return {"parallel_read_safe": True, "parallel_write_safe": True}
