"""The layers that ``transforms.py`` times: ours, and the same layer in Pyro, zuko, normflows and nflows.

All of them have ``HIDDEN`` units in their networks, with ReLU, splines of ``BINS`` bins on [-BOUND, BOUND],
``REFLECTIONS`` Householder reflections, and Sylvester layers as many units as dimensions, Pyro's one choice.
Couplings pass the first half through.  The options are those nearest to ours, and of two the one that is
better for the peer.  What remains different:

- log-scales: ours adds a free offset to a bounded part, Pyro clips, zuko bounds, normflows has exp in the
  coupling and a sigmoid in the autoregressive layer, nflows a sigmoid and a softplus;
- Pyro's couplings have a scale always, so it has no additive one; its spline is the quadratic one, with the
  first half left alone; its LU layer is for images and left out;
- normflows' spline layers are taken without their wrappers, which go the other way around, have residual
  networks and move the first half as well; its autoregressive networks have one activation less, its LU
  layer is the part of ``LULinearPermute`` without the permutation, ``AffineConstFlow`` stands for
  ``ActNorm``, which looks at every call whether it has seen data, and its planar layer has an inverse for
  the leaky ReLU alone, where it is linear: that is the one in the row of inverses;
- zuko's LU layer has no offset, and the inverse of zuko gives its log-determinant by a second evaluation of
  the layer, as ``rsample_and_log_prob`` does;
- nflows divides widths and heights of a coupling's splines by a constant; ``ActNorm`` is in evaluation mode;
- the inverses of planar, radial and Sylvester layers of Pyro look their input up in a cache: there are none.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

from pyro_flowvi import transforms as ours

Map = Callable[[Tensor], tuple[Tensor, Tensor]]

HIDDEN = (64, 64)
BINS = 8
BOUND = 3.0
REFLECTIONS = 16

OURS = "pyro_flowvi"
PEERS = ("Pyro", "zuko", "normflows", "nflows")
INSTALLED = tuple(name for name in PEERS if name == "Pyro" or importlib.util.find_spec(name) is not None)

NETWORK_FLOWS = (
    "additive coupling",
    "affine coupling",
    "spline coupling",
    "affine autoregressive",
    "spline autoregressive",
)
PLAIN_FLOWS = ("planar", "radial", "sylvester", "LU linear", "householder", "elementwise affine")
FLOWS = PLAIN_FLOWS + NETWORK_FLOWS


@dataclass
class Variant:
    """Layers of one library, one after another: the maps to time and the module that owns the parameters."""

    library: str
    module: nn.Module
    forward: Map
    inverse: Map | None


@dataclass
class Part:
    """One layer of a peer; its inverse is None where the library has none."""

    module: nn.Module
    forward: Map
    inverse: Map | None


def _ours(flow: str, dim: int, num_layers: int) -> Variant:
    network: Any = {"hidden": HIDDEN, "activation": "relu"}
    spline: Any = {"num_bins": BINS, "bound": BOUND}
    makers: dict[str, Callable[[], ours.FlowTransform]] = {
        "sylvester": lambda: ours.Sylvester(dim, num_units=dim),
        "LU linear": lambda: ours.LULinear(dim),
        "householder": lambda: ours.Householder(dim, num_reflections=REFLECTIONS),
        "elementwise affine": lambda: ours.ElementwiseAffine(dim),
        "additive coupling": lambda: ours.AdditiveCoupling(dim, **network),
        "affine coupling": lambda: ours.AffineCoupling(dim, **network),
        "spline coupling": lambda: ours.SplineCoupling(dim, **network, **spline),
        "affine autoregressive": lambda: ours.AffineAutoregressive(dim, **network),
        "spline autoregressive": lambda: ours.SplineAutoregressive(dim, **network, **spline),
    }
    layer: ours.FlowTransform
    if flow in ("planar", "radial"):  # one module holds the parameters of all layers
        layer = (ours.Planar if flow == "planar" else ours.Radial)(dim, num_layers=num_layers)
    elif num_layers == 1:
        layer = makers[flow]()
    else:
        layer = ours.Compose([makers[flow]() for _ in range(num_layers)])
    return Variant(OURS, layer, layer.forward_and_log_det, layer.inverse_and_log_det)


class _PyroAffine(nn.Module):
    """Pyro's ``AffineTransform``, with parameters as a model would give it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def transform(self) -> Any:
        return pyro_transforms.AffineTransform(self.loc, self.log_scale.exp(), event_dim=1)


def _pyro(flow: str, dim: int, task: str) -> Part | None:
    half = dim // 2
    order = torch.arange(dim)
    sizes = [BINS, BINS, BINS - 1]
    spline: Any = {"count_bins": BINS, "bound": BOUND, "order": "quadratic"}
    makers: dict[str, Callable[[], Any]] = {
        "planar": lambda: pyro_transforms.Planar(dim),
        "radial": lambda: pyro_transforms.Radial(dim),
        "sylvester": lambda: pyro_transforms.Sylvester(dim, count_transforms=dim),
        "householder": lambda: pyro_transforms.Householder(dim, count_transforms=REFLECTIONS),
        "elementwise affine": lambda: _PyroAffine(dim),
        "affine coupling": lambda: pyro_transforms.AffineCoupling(half, DenseNN(half, HIDDEN, [half, half])),
        "spline coupling": lambda: pyro_transforms.SplineCoupling(
            dim, half, DenseNN(half, HIDDEN, [half * size for size in sizes]), identity=True, **spline
        ),
        "affine autoregressive": lambda: pyro_transforms.AffineAutoregressive(
            AutoRegressiveNN(dim, HIDDEN, permutation=order)
        ),
        "spline autoregressive": lambda: pyro_transforms.SplineAutoregressive(
            dim, AutoRegressiveNN(dim, HIDDEN, param_dims=sizes, permutation=order), **spline
        ),
    }
    if flow not in makers:
        return None
    layer = makers[flow]()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        transform = layer.transform() if isinstance(layer, _PyroAffine) else layer
        y = transform(x)
        # Same objects as in the call: answered from what the call left behind, Pyro's own fast path.
        return y, transform.log_abs_det_jacobian(x, y)

    def inverse(y: Tensor) -> tuple[Tensor, Tensor]:
        transform = layer.transform() if isinstance(layer, _PyroAffine) else layer
        x = transform._inv_call(y)  # what ``transform.inv`` calls
        return x, -transform.log_abs_det_jacobian(x, y)

    # The coupling holds a spline for the first half even where it does not use it.
    owner = layer.upper_spline if flow == "spline coupling" else layer
    return Part(owner, forward, None if flow in ("planar", "radial", "sylvester") else inverse)


def _zuko(flow: str, dim: int, task: str) -> Part | None:
    from zuko import transforms
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.flows.gaussianization import ElementWiseTransform
    from zuko.lazy import UnconditionalTransform

    spline: Any = {
        "univariate": partial(transforms.MonotonicRQSTransform, bound=BOUND),
        "shapes": [(BINS,), (BINS,), (BINS - 1,)],
    }
    additive: Any = {"univariate": transforms.AdditiveTransform, "shapes": [()]}
    coupling = partial(GeneralCouplingTransform, dim, mask=torch.arange(dim) < dim // 2)
    autoregressive = partial(MaskedAutoregressiveTransform, dim)
    makers: dict[str, Callable[[], Any]] = {
        "LU linear": lambda: UnconditionalTransform(transforms.LULinearTransform, LU=torch.eye(dim)),
        "elementwise affine": lambda: ElementWiseTransform(dim),
        "additive coupling": lambda: coupling(**additive, hidden_features=HIDDEN),
        "affine coupling": lambda: coupling(hidden_features=HIDDEN),
        "spline coupling": lambda: coupling(**spline, hidden_features=HIDDEN),
        "affine autoregressive": lambda: autoregressive(hidden_features=HIDDEN),
        "spline autoregressive": lambda: autoregressive(**spline, hidden_features=HIDDEN),
    }
    if flow not in makers:
        return None
    layer = makers[flow]()
    return Part(layer, lambda x: layer().call_and_ladj(x), lambda y: layer().inv.call_and_ladj(y))


class _Network(nn.Sequential):
    """A coupling's network for normflows and nflows; they pass it a context and read ``hidden_features``."""

    def __init__(self, num_in: int, num_out: int) -> None:
        first, second = HIDDEN
        layers = (nn.Linear(num_in, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
        super().__init__(*layers, nn.Linear(second, num_out))
        self.hidden_features = second

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def _masked_network(dim: int) -> dict[str, Any]:
    """The options of normflows and nflows that make a network of two hidden layers."""
    return {
        "features": dim,
        "hidden_features": HIDDEN[0],
        "num_blocks": 1,
        "use_residual_blocks": False,
    }


def _normflows(flow: str, dim: int, task: str) -> Part | None:
    from normflows import flows
    from normflows.flows.affine.coupling import AffineConstFlow
    from normflows.flows.neural_spline import autoregressive, coupling

    half = dim // 2
    spline: Any = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    makers: dict[str, Callable[[], Any]] = {
        "planar": lambda: flows.Planar((dim,), act="tanh" if task == "train" else "leaky_relu"),
        "radial": lambda: flows.Radial((dim,)),
        "LU linear": lambda: flows.LULinearPermute(dim).linear,
        "elementwise affine": lambda: AffineConstFlow((dim,)),
        "additive coupling": lambda: flows.AffineCouplingBlock(_Network(half, dim - half), scale=False),
        "affine coupling": lambda: flows.AffineCouplingBlock(_Network(half, 2 * (dim - half))),
        "spline coupling": lambda: coupling.PiecewiseRationalQuadraticCoupling(
            torch.arange(dim) >= half, _Network, **spline
        ),
        "affine autoregressive": lambda: flows.MaskedAffineAutoregressive(**_masked_network(dim)),
        "spline autoregressive": lambda: autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(
            **_masked_network(dim), **spline
        ),
    }
    if flow not in makers:
        return None
    layer = makers[flow]()
    inverse = None if flow == "radial" or (flow == "planar" and task == "train") else layer.inverse
    return Part(layer, layer, inverse)


def _nflows(flow: str, dim: int, task: str) -> Part | None:
    from nflows import transforms

    mask = torch.arange(dim) >= dim // 2
    spline: Any = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    makers: dict[str, Callable[[], Any]] = {
        "LU linear": lambda: transforms.LULinear(dim),
        "householder": lambda: transforms.HouseholderSequence(dim, REFLECTIONS),
        "elementwise affine": lambda: transforms.ActNorm(dim),
        "additive coupling": lambda: transforms.AdditiveCouplingTransform(mask, _Network),
        "affine coupling": lambda: transforms.AffineCouplingTransform(mask, _Network),
        "spline coupling": lambda: transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, _Network, **spline
        ),
        "affine autoregressive": lambda: transforms.MaskedAffineAutoregressiveTransform(
            **_masked_network(dim)
        ),
        "spline autoregressive": lambda: transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            **_masked_network(dim), **spline
        ),
    }
    if flow not in makers:
        return None
    layer = makers[flow]()
    return Part(layer, layer, layer.inverse)


LIBRARIES: dict[str, Callable[[str, int, str], Part | None]] = {
    "Pyro": _pyro,
    "zuko": _zuko,
    "normflows": _normflows,
    "nflows": _nflows,
}


def _chain(maps: list[Map]) -> Map:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = maps[0](x)
        for step in maps[1:]:
            x, part = step(x)
            log_det = log_det + part
        return x, log_det.expand(x.shape[:-1])  # normflows leaves a constant one without a batch

    return run


def build(library: str, flow: str, dim: int, num_layers: int, task: str) -> Variant | None:
    """The layers of one row in one library; None where it does not have them.

    :param library: :data:`OURS` or one of :data:`INSTALLED`.
    :param flow: one of :data:`FLOWS`.
    :param task: "train" or "inverse".
    """
    if library == OURS:
        return _ours(flow, dim, num_layers)
    made = [LIBRARIES[library](flow, dim, task) for _ in range(num_layers)]
    parts = [part for part in made if part is not None]
    if not parts:
        return None
    inverses = [part.inverse for part in reversed(parts) if part.inverse is not None]
    module = nn.ModuleList(part.module for part in parts).eval()
    inverse = _chain(inverses) if inverses else None
    return Variant(library, module, _chain([part.forward for part in parts]), inverse)
