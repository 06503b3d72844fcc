"""The layers of a posterior, from what a user may give as one."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import nn
from torch.distributions import Transform

from ..._checks import check_widths
from ...flows import FLOWS, defaults_for
from ...transforms import Conditional, ConditionalCompose, IndexedCompose, IndexedLayer, ParametricTransform
from ...transforms.compose import Chain, own_dim

__all__ = ["AMORTIZATIONS", "posterior_parts", "told_dim", "told_latent_dim"]

AMORTIZATIONS: Final = ("base", "context", "hypernetwork")


def told_dim(module: nn.Module, name: str, of_layer: str, *, last: bool) -> int:
    """A length that a network tells by an attribute, or by its first or last linear layer."""
    found = getattr(module, name, None)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if found is None and layers:
        found = getattr(layers[-1 if last else 0], of_layer)
    if found is None:
        raise ValueError(f"{name}: expected a length, which {type(module).__name__} does not tell, got None")
    return int(found)


def told_latent_dim(flow: Any, decoder: nn.Module) -> int:
    """The length of the latent vectors that a posterior tells, or else the decoder."""
    if isinstance(flow, IndexedCompose):
        return flow.inner_dim
    parts = [flow] if not isinstance(flow, list | tuple) else flow
    for part in parts:
        dim = _layer_dim(part)
        if dim is not None:
            return dim
    return told_dim(decoder, "latent_dim", "in_features", last=False)


def posterior_parts(
    flow: Any,
    dim: int,
    feature_dim: int,
    num_layers: int | None,
    hidden: Sequence[int] | None,
    amortize: str,
) -> list[Any]:
    """What follows the normal whose mean and scale come from the encoder."""
    if not isinstance(flow, str):
        for name, value in (("num_layers", num_layers), ("hidden", hidden)):
            if value is not None:
                raise ValueError(f"{name}: expected None unless flow is a name, got {value!r}")
    if flow is None:
        return []
    if isinstance(flow, str):
        if flow not in FLOWS:
            raise ValueError(f"flow: expected one of {sorted(FLOWS)}, got {flow!r}")
        parts = _listed(FLOWS[flow](dim, num_layers=num_layers, hidden=hidden))
    else:
        if not _is_layer(flow) and callable(flow):
            flow = flow(dim)
        if _is_layer(flow):
            parts = _listed(flow)
        elif isinstance(flow, Iterable) and not isinstance(flow, str):
            parts = [piece for part in flow for piece in _listed(part)]
        else:
            raise ValueError(
                "flow: expected None, a key of FLOWS, a callable dim -> Transform, a transform, an "
                f"IndexedFlow or a list of layers, got {flow!r}"
            )
    for part in parts:
        if not _is_layer(part) or _layer_dim(part) not in (None, dim):
            raise ValueError(f"flow: expected transforms of {dim} dimensions, got {part!r}")
        wanted = getattr(part, "context_dim", 0) or 0
        if wanted not in (0, feature_dim):
            raise ValueError(
                f"flow: expected layers of context_dim {feature_dim}, the features, got {wanted}"
            )
    if amortize == "base":
        return parts
    widths: Sequence[int] = ()
    if amortize == "context":
        widths = defaults_for(dim).hidden if hidden is None else check_widths("hidden", hidden)
    for part in parts:
        if not isinstance(part, ParametricTransform):
            raise ValueError(
                f"amortize: expected 'base' unless all layers are ParametricTransforms, got {amortize!r} "
                f"with {part!r}"
            )
    return [Conditional(part, feature_dim, widths) for part in parts]


def _listed(transform: Any) -> list[Any]:
    if isinstance(transform, Chain):
        return list(transform)
    return list(transform.parts) if isinstance(transform, ConditionalCompose) else [transform]


def _is_layer(part: Any) -> bool:
    return isinstance(part, Transform | IndexedLayer) or hasattr(part, "condition")


def _layer_dim(part: Any) -> int | None:
    return part.dim if isinstance(part, IndexedLayer) else own_dim(part)
