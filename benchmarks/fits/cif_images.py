"""Posteriors of a variational autoencoder on binary images: no flow, a spline flow, continuously indexed.

    python -m benchmarks.fits.cif_images [--test joint frozen] [--seeds 5] [--steps 3000]
        [--output FILE]
    python -m benchmarks.fits.cif_images --data DIR [--device cuda] [--checkpoints DIR] [--seeds 3]
    python -m benchmarks.fits.cif_images --report rows.jsonl

The experiment of Caterini, Cornish, Sejdinovic and Doucet, *Variational Inference with Continuously-Indexed
Normalizing Flows*, 2020: the posteriors "VAE" (a diagonal normal), "NSF" (that, and layers of an
LU-decomposed linear map and an autoregressive spline) and "CIF-NSF" (the same layers, made continuously
indexed, with networks narrower by so much that the numbers of parameters match).  Encoder, decoder, data,
their initial values and their minibatches are the same for all three, seed by seed.

- ``joint``: encoder, decoder and posterior trained together on the digits of scikit-learn, 8 x 8 pixels, with
  pixel / 16 as the mean of a pixel, drawn anew for each batch, and 8 latents.  Path gradients (with the
  usual ones the bounds end 0.3 nats lower).  ``--warm-up N`` lets the likelihood's weight rise from 0.1 at
  first to 1 after 0.9 N steps.
- ``frozen``: a decoder of 2 latents is trained once, with a normal posterior; then encoder and
  posterior are trained for that decoder.  So log p(x) is the same for all, and known from quadrature: its
  distance from the ELBO is the divergence of the posterior, in nats.
- ``--data DIR``: MNIST or Fashion-MNIST from its IDX files, in the published configuration (20 latents, 10
  layers, indices of length 2, Adam at 1e-3, batches of 100, 54,000 images to train, 6,000 to validate).  Each
  run has a checkpoint, and goes on from it.  It differs from the published one in what ``fit`` does: the rate
  falls along a cosine, weights are averaged, gradients limited by their running median, and a plateau of the
  validation ELBO ends the run.

Rows are lines of JSON, and those that the file has are not run again.  The log-likelihood is the log of the
mean of 100 (auxiliary) importance weights for each image of one binarised test set.  ``--report`` prints
means, and the paired differences between posteriors with their standard errors over the seeds.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from benchmarks.common.results import Row, collect, read, results_of
from benchmarks.common.tables import markdown
from pyro_flowvi import fit
from pyro_flowvi.datasets import digits, idx_images
from pyro_flowvi.infer import TraceAnnealed_ELBO, TraceSTL_ELBO
from pyro_flowvi.models import ConvDecoder, ConvEncoder, FlowVAE, Minibatches, binarize
from pyro_flowvi.transforms import IndexedLayer, LULinear, SplineAutoregressive

KINDS = ("VAE", "NSF", "CIF-NSF")
PAIRS = (("NSF", "VAE"), ("CIF-NSF", "NSF"))
BATCH = 100
WEIGHTS = 100
FIXED_SET = 12345
"""Seed of the binarised validation and test sets."""


class Setting:
    """One configuration.

    :param dim: the number of latents.
    :param layers: of the flow.
    :param hidden: widths of the spline's networks, without indices and with.
    :param index_dim: the length of each index.
    """

    def __init__(
        self, dim: int, layers: int, hidden: tuple[tuple[int, ...], tuple[int, ...]], index_dim: int
    ) -> None:
        self.dim, self.layers, self.hidden, self.index_dim = dim, layers, hidden, index_dim

    def posterior(self, kind: str) -> list[Any] | None:
        if kind == "VAE":
            return None
        parts: list[Any] = []
        for _ in range(self.layers):
            spline = SplineAutoregressive(self.dim, hidden=self.hidden[kind == "CIF-NSF"])
            if kind == "CIF-NSF":
                parts += [LULinear(self.dim), IndexedLayer(spline, self.index_dim, context_dim=2 * self.dim)]
            else:
                parts += [LULinear(self.dim), spline]
        return parts

    def build(self, kind: str, shape: tuple[int, ...], seed: int, device: str = "cpu") -> FlowVAE:
        """Encoder and decoder come first, so that a seed starts them alike for every posterior."""
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        encoder, decoder = ConvEncoder(shape, 2 * self.dim), ConvDecoder(self.dim, shape)
        return FlowVAE(encoder, decoder, self.posterior(kind)).to(device)


SETTINGS = {
    "joint": Setting(8, 3, ((22, 22), (17, 17)), 2),
    "frozen": Setting(2, 3, ((22, 22), (14, 14)), 2),
    "published": Setting(20, 10, ((44, 44), (40, 40)), 2),
}


def size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


@functools.cache
def digit_sets() -> tuple[Tensor, Tensor, Tensor]:
    """Means to train with, and the fixed validation and test sets."""
    train, validation, test = (torch.from_numpy(part.images / 16).float() for part in digits())
    return train, binarize(validation, FIXED_SET), binarize(test, FIXED_SET)


def settings(key: Row) -> tuple[int, float, int, int]:
    return key["steps"], key["rate"], key["warm_up"], key["seed"]


def scores(vae: FlowVAE, test: Tensor, seed: int) -> Row:
    pyro.set_rng_seed(1000 + seed)
    elbo = vae.elbo(test, WEIGHTS)
    return {"test_ll": float(vae.log_prob(test, WEIGHTS).mean()), "test_elbo": float(elbo.mean())}


def train(vae: FlowVAE, batches: Minibatches, steps: int, rate: float, warm_up: int, seed: int) -> Row:
    """All steps are taken, and of the averaged weights those kept that have the best validation ELBO."""
    started = time.perf_counter()
    result = fit(
        vae.model,
        vae.guide,
        batches=batches,
        validation=digit_sets()[1],
        num_steps=steps,
        lr=rate,
        # A schedule, also a constant one, runs to its end: no posterior gains by when it stops.
        loss=TraceAnnealed_ELBO(
            lambda step: min(1.0, 0.1 + step / warm_up) if warm_up else 1.0, max_plate_nesting=1
        ),
        seed=seed,
        compile=len(list(vae.parameters())) > 20,  # half a minute, for steps of half the time
        progress=False,
    )
    return {
        "parameters": size(vae),
        "seconds": time.perf_counter() - started,
        "steps_taken": len(result.losses),
        "stop_reason": result.stop_reason,
        "skipped": result.num_skipped,
        "restarts": result.num_restarts,
    }


def run_joint(key: Row) -> Row:
    means, _, test = digit_sets()
    vae = SETTINGS["joint"].build(key["posterior"], (1, 8, 8), key["seed"])
    found = train(vae, Minibatches(means, BATCH, seed=key["seed"]), *settings(key))
    return {**found, **scores(vae, test, key["seed"])}


# -- a posterior for a fixed decoder ---------------------------------------------------------------


@functools.cache
def frozen_decoder(steps: int, rate: float, warm_up: int) -> nn.Module:
    means = digit_sets()[0]
    vae = SETTINGS["frozen"].build("VAE", (1, 8, 8), 99)
    train(vae, Minibatches(means, BATCH, seed=99), steps, rate, warm_up, 99)
    return vae.decoder.requires_grad_(False)


@torch.no_grad()
def log_evidence(decoder: nn.Module, x: Tensor, points: int = 401, width: float = 6.0) -> Tensor:
    """log p(x) by quadrature over two latents, shape ``(B,)``."""
    line = torch.linspace(-width, width, points)
    grid = torch.cartesian_prod(line, line)
    log_prior = -0.5 * grid.square().sum(-1) - math.log(2 * math.pi)
    parts = []
    for z, prior in zip(grid.split(20_000), log_prior.split(20_000), strict=True):
        logits = decoder(z).flatten(1)
        log_p = x.flatten(1) @ logits.T - nn.functional.softplus(logits).sum(-1) + prior
        parts.append(log_p.logsumexp(-1))
    return torch.stack(parts).logsumexp(0) + 2 * math.log(2 * width / (points - 1))


def run_frozen(key: Row) -> Row:
    means, _, test = digit_sets()
    decoder = frozen_decoder(*settings(key)[:3])
    vae = SETTINGS["frozen"].build(key["posterior"], (1, 8, 8), key["seed"])
    vae.decoder = decoder
    found = train(vae, Minibatches(means, BATCH, seed=key["seed"]), *settings(key))
    truth = float(log_evidence(decoder, test).mean())
    rows = {**found, **scores(vae, test, key["seed"]), "log_evidence": truth}
    train_set = binarize(means, FIXED_SET)
    exact = float(log_evidence(decoder, train_set).mean())
    return {
        **rows,
        "gap": truth - rows["test_elbo"],
        "train_gap": exact - float(vae.elbo(train_set, WEIGHTS).mean()),
        "trained": rows["parameters"] - size(decoder),
    }


# -- MNIST and its kin -----------------------------------------------------------------------------


def run_published(key: Row, arguments: argparse.Namespace) -> Row:
    train_part, test_part = idx_images(arguments.data)
    device = arguments.device
    means = torch.from_numpy(train_part.images / 255).float()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(means)))
    held_out = max(1, len(means) // 10)
    validation = binarize(means[order[:held_out]], FIXED_SET).to(device)
    test = binarize(torch.from_numpy(test_part.images / 255).float(), FIXED_SET).to(device)
    setting, kind, seed = SETTINGS["published"], key["posterior"], key["seed"]
    vae = setting.build(kind, tuple(means.shape[1:]), seed, device)
    batches = Minibatches(means[order[held_out:]].to(device), BATCH, seed=seed)
    checkpoint = None
    if arguments.checkpoints is not None:
        arguments.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = arguments.checkpoints / f"{key['data']}_{kind}_{seed}.pt"
    result = fit(
        vae.model,
        vae.guide,
        batches=batches,
        validation=validation,
        num_steps=key["steps"],
        lr=key["rate"],
        loss=TraceSTL_ELBO(max_plate_nesting=1),
        seed=seed,
        checkpoint=checkpoint,
    )
    return {
        "parameters": size(vae),
        "seconds": result.wall_time,
        "steps_taken": len(result.losses),
        "stop_reason": result.stop_reason,
        **scores(vae, test, seed),
    }


# -- report ----------------------------------------------------------------------------------------


def differences(rows: list[Row], first: str, second: str, score: str) -> np.ndarray[Any, Any]:
    """Paired by seed."""
    values = [
        {row["seed"]: row[score] for row in rows if row["posterior"] == kind} for kind in (first, second)
    ]
    return np.array(
        [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]
    )


def with_error(values: np.ndarray[Any, Any]) -> str:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():.4f} ± {error:.4f}"


def report(path: Path) -> None:
    good = [row for row in read(path) if "error" not in row]
    fields = ("data", "test", "steps", "rate", "warm_up")
    good.sort(key=lambda row: [str(row[name]) for name in fields])
    for setting, group in itertools.groupby(good, key=lambda row: [row[name] for name in fields]):
        rows = list(group)
        names = [name for name in ("test_ll", "test_elbo", "gap", "train_gap") if name in rows[0]]
        print(f"\n{setting[0]}, {setting[1]}: {setting[2]} steps at {setting[3]:g}, warm-up {setting[4]}\n")
        lines = []
        for kind in KINDS:
            own = [row for row in rows if row["posterior"] == kind]
            if own:
                cells = [with_error(np.array([row[name] for row in own])) for name in names]
                seconds = f"{np.mean([row['seconds'] for row in own]):.0f}"
                lines.append([kind, str(own[0]["parameters"]), str(len(own)), *cells, seconds])
        print(markdown(["posterior", "parameters", "seeds", *names, "s"], lines))
        print()
        lines = []
        for first, second in PAIRS:
            cells = []
            for name in names:
                found = differences(rows, first, second, name)
                if len(found) < 2:
                    cells.append("–")
                    continue
                ratio = abs(found.mean()) / (found.std(ddof=1) / math.sqrt(len(found)))
                cells.append(f"{with_error(found)} ({ratio:.1f} s.e.)")
            lines.append([f"{first} less {second}", *cells])
        print(markdown(["paired difference", *names], lines))


def say(row: Row) -> str:
    if "error" in row:
        return f"{row['test']} {row['posterior']} {row['seed']}: {row['error']}"
    gap = f", gap {row['gap']:.4f}" if "gap" in row else ""
    return (
        f"{row['test']:9s} {row['posterior']:8s} seed {row['seed']}: {row['parameters']} parameters, "
        f"ELBO {row['test_elbo']:.3f}, log-likelihood {row['test_ll']:.3f}{gap}, {row['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", nargs="+", choices=("joint", "frozen"), default=["joint", "frozen"])
    parser.add_argument("--posteriors", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="3000 on digits, 162,000 (300 epochs) with --data")
    parser.add_argument("--rate", type=float, help="Adam's rate to start from: 5e-3 on digits, else 1e-3")
    parser.add_argument("--warm-up", type=int, default=0, help="steps of a rising weight of the likelihood")
    parser.add_argument("--data", type=Path, metavar="DIR", help="of the four IDX files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, default=results_of("cif_images"))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is not None:
        report(arguments.report)
        return
    published = arguments.data is not None
    steps = arguments.steps or (162_000 if published else 3000)
    common = {"steps": steps, "rate": arguments.rate or (1e-3 if published else 5e-3)}
    common |= {"warm_up": arguments.warm_up}
    tests = ["published"] if published else arguments.test
    data = arguments.data.resolve().name if published else "digits"
    runs: dict[str, Callable[[Row], Row]] = {
        "joint": run_joint,
        "frozen": run_frozen,
        "published": functools.partial(run_published, arguments=arguments),
    }
    keys = [
        {"data": data, "test": test, **common, "posterior": kind, "seed": seed}
        for test in tests
        for seed in range(arguments.seeds)
        for kind in arguments.posteriors
    ]
    collect(keys, arguments.output, lambda key: runs[key["test"]](key), say)
    report(arguments.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
