"""Time planar and radial layers against the same layers in Pyro and normflows.

Two tasks, eager, float32, on one batch shared by all:

- *train*: forward, log-determinant and the gradient of ``sum(y**2) + sum(log_det)`` with respect to the
  input and to all parameters;
- *inverse*: inverse and its log-determinant, without gradients.  Pyro's planar and radial have none (they
  look their input up in a cache), normflows' planar has one for the leaky ReLU alone, where it is linear.

The variants of a row take turns in every round, so that a disturbance of the machine meets all of them; the
table has the medians over rounds and the ratio ours / fastest peer, with an interval over rounds::

    python benchmarks/transforms.py [--threads 1] [--rounds 30] [--json FILE]

The peers come with ``pip install "pyro-flowvi[bench]"``; one that is not installed is left out.
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyro.distributions.transforms as pyro_transforms
import torch
from torch import Tensor, nn

from pyro_flowvi.transforms import Planar, Radial

Map = Callable[[Tensor], tuple[Tensor, Tensor]]

HAS_NORMFLOWS = importlib.util.find_spec("normflows") is not None
OURS = "pyro_flowvi"
PYRO = "Pyro"
NORMFLOWS = "normflows"
NORMFLOWS_LEAKY = "normflows leaky ReLU"
COLUMNS = (OURS, PYRO, NORMFLOWS, NORMFLOWS_LEAKY)


@dataclass
class Variant:
    """K layers of one library: the maps to time and the modules that own the parameters."""

    name: str
    modules: nn.ModuleList
    forward: Map
    inverse: Map | None = None


@dataclass
class Row:
    """Milliseconds a call by variant, and ours / fastest peer: median, 2.5 and 97.5 % quantiles."""

    flow: str
    num_layers: int
    task: str
    median_ms: dict[str, float]
    fastest_peer: str | None
    ratio: tuple[float, float, float] | None


def _ours(layers: Planar | Radial) -> Variant:
    return Variant(OURS, nn.ModuleList([layers]), layers.forward_and_log_det, layers.inverse_and_log_det)


def _pyro(layers: list[nn.Module]) -> Variant:
    modules = nn.ModuleList(layers)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = None
        for layer in modules:
            y = layer(x)
            # Same objects as in the call: answered from what the call left behind, Pyro's own fast path.
            part = layer.log_abs_det_jacobian(x, y)
            log_det = part if log_det is None else log_det + part
            x = y
        return x, log_det

    return Variant(PYRO, modules, forward)


def _normflows(name: str, layers: list[nn.Module], has_inverse: bool) -> Variant:
    modules = nn.ModuleList(layers)

    def chain(methods: list[Map], x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = None
        for method in methods:
            x, part = method(x)
            log_det = part if log_det is None else log_det + part
        return x, log_det

    forwards = [layer.__call__ for layer in modules]
    inverses = [layer.inverse for layer in reversed(modules)]
    return Variant(
        name,
        modules,
        lambda x: chain(forwards, x),
        (lambda y: chain(inverses, y)) if has_inverse else None,
    )


def variants(flow: str, dim: int, num_layers: int) -> Iterator[Variant]:
    """The variants of one row that are installed, ours first."""
    layer = Planar if flow == "planar" else Radial
    yield _ours(layer(dim, num_layers=num_layers))
    layer = pyro_transforms.Planar if flow == "planar" else pyro_transforms.Radial
    yield _pyro([layer(dim) for _ in range(num_layers)])
    if HAS_NORMFLOWS:
        import normflows.flows as nf

        if flow == "radial":
            yield _normflows(NORMFLOWS, [nf.Radial((dim,)) for _ in range(num_layers)], False)
            return
        for name, act in ((NORMFLOWS, "tanh"), (NORMFLOWS_LEAKY, "leaky_relu")):
            layers = [nf.Planar((dim,), act=act) for _ in range(num_layers)]
            yield _normflows(name, layers, act == "leaky_relu")


def train_call(variant: Variant, batch: Tensor) -> Callable[[], object]:
    params = list(variant.modules.parameters())

    def call() -> object:
        # A fresh object, without a copy: Pyro answers from its cache for an input that it has seen.
        x = batch.detach().requires_grad_()
        y, log_det = variant.forward(x)
        return torch.autograd.grad(y.square().sum() + log_det.sum(), [x, *params])

    return call


def inverse_call(variant: Variant, batch: Tensor) -> Callable[[], object]:
    inverse = variant.inverse
    assert inverse is not None

    def call() -> object:
        with torch.no_grad():
            return inverse(batch.detach())

    return call


def interleaved_ms(calls: dict[str, Callable[[], object]], rounds: int, loop: int) -> dict[str, list[float]]:
    """Milliseconds a call, one number a round for each variant; the order rotates."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for step in range(-2, rounds):  # the first two warm up
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(loop):
                call()
            elapsed = time.perf_counter() - start
            if step >= 0:
                times[name].append(1e3 * elapsed / loop)
    return times


def measure(flow: str, num_layers: int, task: str, options: argparse.Namespace) -> Row:
    torch.manual_seed(0)
    batch = torch.randn(options.batch, options.dim)
    calls = {}
    for variant in variants(flow, options.dim, num_layers):
        with torch.no_grad():
            for param in variant.modules.parameters():
                param.add_(0.1 * torch.randn_like(param))  # ours start as the identity: leave it
        if task == "train":
            calls[variant.name] = train_call(variant, batch)
        elif variant.inverse is not None:
            calls[variant.name] = inverse_call(variant, batch)
    gc.collect()
    times = interleaved_ms(calls, options.rounds, max(1, options.loop // num_layers))
    medians = {name: statistics.median(values) for name, values in times.items()}
    peers = [name for name in medians if name != OURS]
    if not peers:
        return Row(flow, num_layers, task, medians, None, None)
    fastest = min(peers, key=lambda name: medians[name])
    ratios = torch.tensor(times[OURS]) / torch.tensor(times[fastest])
    middle, low, high = ratios.quantile(torch.tensor([0.5, 0.025, 0.975])).tolist()
    return Row(flow, num_layers, task, medians, fastest, (middle, low, high))


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table, milliseconds a call."""
    lines = ["| flow | K | task | " + " | ".join(COLUMNS) + " | ours / fastest peer |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 4))
    for row in rows:
        cells = []
        for name in COLUMNS:
            absent = "not installed" if name.startswith(NORMFLOWS) and not HAS_NORMFLOWS else "none"
            cells.append(f"{row.median_ms[name]:.3f}" if name in row.median_ms else absent)
        verdict = "no peer"
        if row.ratio is not None:
            verdict = "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio) + f", {row.fastest_peer}"
        lines.append(f"| {row.flow} | {row.num_layers} | {row.task} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="at least 15 for a usable interval")
    parser.add_argument("--loop", type=int, default=16, help="calls a round with one layer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float32)
    setting = (
        f"batch {options.batch} x dimension {options.dim}, float32, eager, {options.threads} thread(s), "
        f"{options.rounds} rounds, torch {torch.__version__}, {platform.machine()}"
    )
    print(f"Milliseconds a call, median: {setting}.")
    if not HAS_NORMFLOWS:
        print("normflows is not installed: skipped.")
    tasks = ("train", "inverse")
    rows = [
        measure(flow, num_layers, task, options)
        for flow in ("planar", "radial")
        for num_layers in options.layers
        for task in tasks
    ]
    print("\n" + markdown(rows))
    if options.json is not None:
        figures = {"setting": setting, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
