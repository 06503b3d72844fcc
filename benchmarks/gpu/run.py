"""What a GPU gains: milliseconds a step by particles and dimension, and four larger problems.

    python -m benchmarks.gpu.run [--device cuda|cpu] [--quick] [--parts NAME ...]
        [--output benchmarks/results/gpu.jsonl]

benchmarks/gpu.sh runs the tests marked cuda first, then this.  Parts:

- *steps*: AutoRealNVP on a correlated normal of D latents, with P particles, in float32 and float64: a step
  of eager SVI and of ``CompiledSVI``; on a GPU also the CPU's compiled step, for P up to 4,096;
- *graphs*: on a GPU, the compiled gradient step as a CUDA graph of ``_compile/inductor_cuda_graph.py`` beside
  ``torch.compile`` of the same loss in ``mode="reduce-overhead"``, Inductor's own CUDA graphs;
- *regression*: ``fit`` of a logistic regression, 1,000,000 x 100;
- *vae*: steps of FlowVAE on 28 x 28 images;
- *rows*: the structured guide with 1,000,000 rows of a subsampled plate.

Every measurement is a line of JSON with machine, versions and commit.  A part stops starting new
measurements when its share of the time is over and says so in a line; one that fails leaves a line with the
error, the others go on, and the exit status is 1.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_flowvi
from benchmarks.common.results import append, results_of
from pyro_flowvi.models import Minibatches, MLPDecoder, MLPEncoder
from pyro_flowvi.objectives import TraceSTL_ELBO

OUTPUT = results_of("gpu")
SECONDS = {"steps": 170.0, "graphs": 40.0, "regression": 60.0, "vae": 40.0, "rows": 60.0}
"""What each part may take."""
SMALL = {"num_layers": 2}
"""AutoRealNVP with --quick, so that its steps compile in seconds."""
CPU_PARTICLES = 4_096
Lines = Iterator[dict[str, Any]]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], Any], device: torch.device, seconds: float) -> tuple[float, int]:
    """Of one call, after a first one; over about so many seconds, and how many calls that were."""
    step()
    wait(device)
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        step()
        count += 1
    wait(device)
    return 1e3 * (time.perf_counter() - start) / count, count


def peak_mib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def normal(dim: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A correlated normal, whose density costs D² a draw."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.eye(dim) + torch.randn(dim, dim, generator=generator).tril(-1) / dim
    factor, loc = factor.to(device, dtype), torch.zeros(dim, device=device, dtype=dtype)

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=factor))

    return model


def svi_of(
    dim: int, particles: int, device: torch.device, dtype: torch.dtype, compile: bool, **sizes: int
) -> SVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = normal(dim, device, dtype)
    guide = pyro_flowvi.AutoRealNVP(model, **sizes)
    loss = TraceSTL_ELBO(num_particles=particles, vectorize_particles=True)
    if not compile:
        return SVI(model, guide, Adam({"lr": 1e-3}), loss)
    return pyro_flowvi.CompiledSVI(model, guide, Adam({"lr": 1e-3}), loss, compile=True)


def steps(device: torch.device, quick: bool, time_left: Callable[[], float]) -> Lines:
    dims, particles = ((10, 100), (64,)) if quick else ((10, 100, 1000), (64, 512, 4096, 65536))
    sizes = SMALL if quick else {}
    for dtype in (torch.float32, torch.float64):
        for dim in dims:
            for count in particles:
                row: dict[str, Any] = {"dim": dim, "particles": count, "dtype": str(dtype), **sizes}
                if time_left() <= 0.0:
                    yield row | {"skipped": "no time left"}
                    continue
                ways = [("eager", device, False), ("compiled", device, True)]
                if device.type != "cpu" and count <= CPU_PARTICLES and dtype == torch.float32:
                    ways.append(("cpu", torch.device("cpu"), True))
                for name, place, compile in ways:
                    try:
                        svi = svi_of(dim, count, place, dtype, compile, **sizes)
                        start = time.perf_counter()
                        svi.step(), svi.step()
                        row[f"{name}_first_seconds"] = time.perf_counter() - start
                        row[f"{name}_ms"], row[f"{name}_steps"] = milliseconds(svi.step, place, 0.5)
                        del svi
                    except torch.OutOfMemoryError as error:
                        row[f"{name}_error"] = str(error).partition("\n")[0]
                yield row | {"peak_mib": peak_mib(device)}


def graphs(device: torch.device, quick: bool, time_left: Callable[[], float]) -> Lines:
    """Both kinds of CUDA graphs on the gradient of a flow's ELBO; on the CPU, Inductor's code alone."""
    dim, particles = (10, 64) if quick else (100, 512)
    dtype = torch.float32
    model = normal(dim, device, dtype)
    guide = pyro_flowvi.AutoRealNVP(model, **(SMALL if quick else {})).materialize()
    flow = guide.flow
    target = pyro.poutine.trace(model).get_trace().nodes["x"]["fn"]

    def gradient() -> Any:
        for param in flow.parameters():
            param.grad = None
        x = torch.randn(particles, dim, device=device, dtype=dtype)
        z, log_det = flow.forward_and_log_det(x)
        loss = -(target.log_prob(z) + log_det).mean()
        loss.backward()
        return loss

    row: dict[str, Any] = {"dim": dim, "particles": particles, "dtype": str(dtype)}
    row["eager_ms"], _ = milliseconds(gradient, device, 0.5)

    def elbo(x: torch.Tensor) -> torch.Tensor:
        z, log_det = flow.forward_and_log_det(x)
        return -(target.log_prob(z) + log_det).mean()

    modes = ["default", "reduce-overhead"] if device.type == "cuda" else ["default"]
    for mode in modes:
        compiled = torch.compile(elbo, mode=mode, fullgraph=False)

        def compiled_gradient(compiled: Any = compiled) -> Any:
            for param in flow.parameters():
                param.grad = None
            loss = compiled(torch.randn(particles, dim, device=device, dtype=dtype))
            loss.backward()
            return loss

        row[f"torch_compile_{mode}_ms"], _ = milliseconds(compiled_gradient, device, 0.5)
    svi = svi_of(dim, particles, device, dtype, True, **(SMALL if quick else {}))
    svi.step(), svi.step()
    row["compiled_svi_ms"], _ = milliseconds(svi.step, device, 0.5)
    row["compiled_svi_has"] = "gradient and Adam"
    yield row


def fitted(model: Any, guide: Any, *data: torch.Tensor, num_steps: int) -> dict[str, Any]:
    """How long a fit took, and what of it."""
    device, start = data[0].device, time.perf_counter()
    result = pyro_flowvi.fit(model, guide, *data, num_steps=num_steps, seed=0, progress=False)
    wait(device)
    return {
        "fit_seconds": time.perf_counter() - start,
        "steps": len(result.losses),
        "start": result.start,
        "peak_mib": peak_mib(device),
    }


def regression(device: torch.device, quick: bool, time_left: Callable[[], float]) -> Lines:
    rows, columns = (10_000, 20) if quick else (1_000_000, 100)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    truth = torch.randn(columns, generator=generator) / columns**0.5
    y = torch.bernoulli((x @ truth).sigmoid(), generator=generator)
    x, y = x.to(device), y.to(device)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=w @ x.mT), obs=y)

    guide = pyro_flowvi.AutoRealNVP(model)
    found = fitted(model, guide, x, y, num_steps=10 if quick else 50)
    mean = guide.sample_posterior(1000)["w"].mean(0).cpu()
    yield {
        "rows": rows,
        "columns": columns,
        **found,
        "error_of_mean": float((mean - truth).norm()),
    }


def vae(device: torch.device, quick: bool, time_left: Callable[[], float]) -> Lines:
    size, batch, hidden = ((1, 28, 28), 50, (64,)) if quick else ((1, 28, 28), 250, (500, 500))
    encoder, decoder = MLPEncoder(size, hidden), MLPDecoder(16, size, hidden)
    model = pyro_flowvi.FlowVAE(encoder, decoder, "planar", num_layers=4, amortize="hypernetwork").to(device)
    batches = Minibatches(
        torch.rand(20 * batch, *size, generator=torch.Generator().manual_seed(0)).to(device), batch
    )
    for compile in (False, True):
        pyro.clear_param_store()
        make = pyro_flowvi.CompiledSVI if compile else SVI
        options = {"compile": True} if compile else {}
        svi = make(model.model, model.guide, Adam({"lr": 1e-4}), TraceSTL_ELBO(), **options)
        images = batches(0)
        svi.step(images), svi.step(images)
        ms, count = milliseconds(lambda svi=svi, images=images: svi.step(images), device, 1.0)
        yield {"batch": batch, "compiled": compile, "ms": ms, "steps": count, "peak_mib": peak_mib(device)}


def rows(device: torch.device, quick: bool, time_left: Callable[[], float]) -> Lines:
    number, page = (2_000, 200) if quick else (1_000_000, 10_000)
    y = torch.randn(number, generator=torch.Generator().manual_seed(0)).to(device)

    def model(y: torch.Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", len(y), subsample_size=page, device=str(y.device)) as i:
            own = pyro.sample("own", dist.Normal(centre, 1.0))
            pyro.sample("y", dist.Normal(own, 0.5), obs=y[i])

    guide = pyro_flowvi.AutoRealNVP(model)
    yield {"rows": number, "page": page, **fitted(model, guide, y, num_steps=20 if quick else 200)}


PARTS = {"steps": steps, "graphs": graphs, "regression": regression, "vae": vae, "rows": rows}


def about(device: torch.device, quick: bool) -> dict[str, Any]:
    """Device and threads of a line."""
    found = {"device": device.type, "threads": torch.get_num_threads(), "quick": quick}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def run_part(name: str, device: torch.device, quick: bool) -> Lines:
    """The measurements of a part; an error as the last line."""
    end = time.perf_counter() + SECONDS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for row in PARTS[name](device, quick, lambda: end - time.perf_counter()):
            yield {"part": name, **row, **about(device, quick)}
    except Exception as error:
        traceback.print_exc()
        yield {"part": name, "error": f"{type(error).__name__}: {error}"[:500], **about(device, quick)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: --device cpu --quick runs the same code", file=sys.stderr)
        return 2
    failed = False
    for name in options.parts:
        for row in run_part(name, device, options.quick):
            failed |= "error" in row
            print(json.dumps(append(options.output, row)), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
