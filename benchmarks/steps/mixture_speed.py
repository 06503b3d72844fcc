"""What K flows in one batched call cost against one: steps of maximum likelihood, 8 layers of width 8.

    python -m benchmarks.steps.mixture_speed [--batch 512] [--repeats 40] [--compile]
        [--output FILE]

The steps are interleaved; the table has medians of their CPU milliseconds, on one thread.  "loop"
evaluates K separate flows one after another, which is what the batched call replaces.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO

from benchmarks.common.results import append, results_of
from pyro_flowvi.distributions import FlowDistribution, MixtureOfFlows
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.infer import CompiledSVI
from pyro_flowvi.models import VMoNF
from pyro_flowvi.transforms import Stacked

SIZES = {"num_layers": 8, "hidden": (8,)}


def batched(num: int, x: torch.Tensor) -> Callable[[], None]:
    mixture = MixtureOfFlows(None, Stacked(FLOWS["realnvp"](2, **SIZES) for _ in range(num)))
    params = list(mixture.components.transform.parameters())
    return lambda: torch.autograd.grad(mixture.log_prob(x).sum(), params)


def loop(num: int, x: torch.Tensor) -> Callable[[], None]:
    flows = [FlowDistribution(None, FLOWS["realnvp"](2, **SIZES)) for _ in range(num)]
    params = [param for flow in flows for param in flow.transform.parameters()]

    def step() -> None:
        each = torch.stack([flow.log_prob(x) for flow in flows], -1)
        torch.autograd.grad(each.logsumexp(-1).sum(), params)

    return step


def svi(kind: type, num: int, x: torch.Tensor, **options: object) -> Callable[[], None]:
    vmonf = VMoNF(num, 2, **SIZES)
    steps = kind(
        vmonf.model,
        vmonf.guide,
        pyro.optim.Adam({"lr": 1e-3}),
        TraceEnum_ELBO(max_plate_nesting=1),
        **options,
    )
    return lambda: steps.step(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument(
        "--compile", action="store_true", help="also compiled steps, after a minute of compiling"
    )
    parser.add_argument("--output", type=Path, default=results_of("mixture_speed"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x = torch.randn(args.batch, 2)
    kinds = {
        "log_prob and gradient, batched": batched,
        "log_prob and gradient, loop": loop,
        "SVI step": lambda num, x: svi(SVI, num, x),
    }
    if args.compile:
        kinds["CompiledSVI step"] = lambda num, x: svi(CompiledSVI, num, x, compile=True)
    steps = {(name, num): make(num, x) for name, make in kinds.items() for num in (1, 10)}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(args.repeats):
        for key, step in steps.items():
            start = time.process_time()
            step()
            times[key].append(1e3 * (time.process_time() - start))
    print(f"torch {torch.__version__}, 1 thread, batch {args.batch}, medians of {args.repeats}, ms\n")
    print("| | K = 1 | K = 10 | ratio |\n|---|---|---|---|")
    for name in kinds:
        one, ten = (statistics.median(times[name, num]) for num in (1, 10))
        key = {"step": name, "batch": args.batch, "repeats": args.repeats}
        append(args.output, {**key, "one_ms": one, "ten_ms": ten, "ratio": ten / one})
        print(f"| {name} | {one:.2f} | {ten:.2f} | {ten / one:.2f} |")


if __name__ == "__main__":
    main()
