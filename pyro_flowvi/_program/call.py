"""The model's arguments in a call: keywords that are the model's, batches, programs in the wrong place."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch import nn

from .._types import Program, Trace

__all__ = [
    "as_call",
    "as_keywords",
    "as_program",
    "check_batch",
    "check_guide_trace",
    "check_programs",
    "is_handler",
    "keywords_of",
    "options_of",
    "refusing_data",
]


class UnexpectedKeyword(TypeError, ValueError):
    """A keyword that nobody knows: Python's kind of error for it, and the kind of all others here."""


def options_of(function: Callable[..., Any]) -> frozenset[str]:
    """The keywords that a function owns."""
    kinds = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in kinds if p.kind is inspect.Parameter.KEYWORD_ONLY)


def keywords_of(model: Program) -> frozenset[str] | None:
    """The names that a model can be given by keyword; None if it takes any, or does not tell."""
    try:
        found = inspect.signature(
            model.forward if isinstance(model, nn.Module) else model
        ).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found):
        return None
    allowed = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return frozenset(p.name for p in found if p.kind in allowed)


def as_keywords(
    function: Callable[..., Any],
    model: Program,
    kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The model's keyword arguments, of those that a call of ``function`` was given beyond its own options.

    :param function: whose keyword-only parameters are its options.
    :param kwargs: the keywords that are not among them.
    :param model_kwargs: those that were passed apart, of any name.
    :raises UnexpectedKeyword: for one that the model does not take either; names the nearest that exists.
    :raises ValueError: if ``model_kwargs`` is no mapping, or a name is in both.
    """
    if not (model_kwargs is None or isinstance(model_kwargs, Mapping)):
        raise ValueError(f"model_kwargs: expected a mapping from names to values, got {model_kwargs!r}")
    both = sorted(set(kwargs) & set(model_kwargs or {}))
    if both:
        raise ValueError(
            f"model_kwargs: expected names that are not passed as keywords too, got {both} in both"
        )
    known, options = keywords_of(model), options_of(function)
    for name in kwargs:
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, sorted(options | known), 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnexpectedKeyword(
                f"{name}: expected an option of {function.__name__} or an argument of the model "
                f"({', '.join(sorted(known)) or 'it has none'}), got the keyword {name!r}{hint}"
            )
    return {**kwargs, **(model_kwargs or {})}


def as_call(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a batch.

    That is a tuple or list of arguments, a mapping of keyword arguments, ``(args, kwargs)``, or one argument.
    A DataLoader makes lists of tuples.
    """
    if _is_keywords(value):
        return (), dict(value)
    if isinstance(value, tuple | list):
        if len(value) == 2 and isinstance(value[0], tuple | list) and _is_keywords(value[1]):
            return tuple(value[0]), dict(value[1])
        return tuple(value), {}
    return (value,), {}


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def check_batch(name: str, model: Program, kwargs: Mapping[str, Any]) -> None:
    """Refuses keywords that the model does not take, where a batch may be one argument that is a dict.

    :raises UnexpectedKeyword: with the remedy.
    """
    known = keywords_of(model)
    unknown = [] if known is None else sorted(set(kwargs) - known)
    if unknown:
        takes = ", ".join(sorted(known or ())) or "it has none"
        raise UnexpectedKeyword(
            f"{name}: expected keyword arguments of the model ({takes}), got {unknown}; one argument that is "
            "a dict is the batch (dict,)"
        )


def check_programs(model: Any, guide: Any) -> None:
    """Refuses what is no program, a class in place of an instance, and a guide in the place of the model.

    :raises ValueError: with the remedy.
    """
    for name, program in (("model", model), ("guide", guide)):
        if inspect.isclass(program):
            remedy = "(model)" if issubclass(program, AutoGuide) else "(...)"
            raise ValueError(
                f"{name}: expected an instance, got the class {program.__name__}; "
                f"write {program.__name__}{remedy}"
            )
        if not callable(program):
            raise ValueError(f"{name}: expected a callable, got {program!r}")
    kinds = AutoGuide | GuideMessenger
    if isinstance(model, kinds) and not isinstance(guide, kinds):
        raise ValueError(
            f"model: expected a model, got the guide {type(model).__name__}; "
            "are model and guide swapped? The model comes first"
        )


def is_handler(guide: Program) -> bool:
    """Whether a guide is one of Pyro's ``GuideMessenger``, which run the model with draws of their own."""
    return isinstance(poutine.unwrap(guide), GuideMessenger)


def as_program(guide: Program) -> Program:
    """The guide with its latents alone: a handler's run shows what the model observes as well."""
    return poutine.block(guide, hide_fn=_observed) if is_handler(guide) else guide


def _observed(site: Any) -> bool:
    return bool(site["type"] == "sample" and site["is_observed"])


def check_guide_trace(trace: Trace) -> None:
    """Refuses a guide that has observed sites: factors apart, it is the model.

    :raises ValueError: naming the site.
    """
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            _refuse_data(name, site)


class _RefuseData(Messenger):
    def _pyro_post_sample(self, msg: Any) -> None:
        _refuse_data(msg["name"], msg)


def refusing_data(guide: Program) -> Program:
    """A guide that raises as :func:`check_guide_trace` where it observes data: for its first run.

    A handler in the place of the guide stays as it is, since Pyro asks for its class.
    """
    return _RefuseData()(guide) if inspect.isroutine(guide) else guide


def _refuse_data(name: str, site: Any) -> None:
    if site["is_observed"] and _is_data(site):
        raise ValueError(
            f"guide: expected a guide, got a program that observes site {name!r}; "
            "are model and guide swapped? The model comes first"
        )


def _is_data(site: Any) -> bool:
    """Whether an observed site is one of data: no factor, no ``pyro.deterministic``."""
    return not (site["infer"].get("is_auxiliary") or site["infer"].get("_deterministic"))
