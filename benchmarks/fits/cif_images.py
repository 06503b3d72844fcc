"""Posteriors of a variational autoencoder on binary images: no flow, a spline flow, continuously indexed.

    python -m benchmarks.fits.cif_images [--test joint frozen] [--seeds 5] [--steps 3000]
        [--output FILE]
    python -m benchmarks.fits.cif_images --data DIR [--layers 5] [--steps 8000] [--seeds 3]
        [--checkpoints DIR] [--device cuda]
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
- ``published``, with ``--data DIR``: MNIST, in the published configuration (20 latents, 10 layers, indices of
  length 2, Adam at 1e-3, batches of 100) unless ``--layers`` says otherwise.  A folder that has MNIST's test
  images alone is cut into 8,000 to train, 1,000 to validate and 1,000 to test.  It differs from the published
  one in what ``fit`` does: path gradients, a rate that falls along a cosine, averaged weights, gradients
  limited by their running median; and all posteriors take the same number of steps.  With ``--checkpoints``
  a run that was stopped goes on from its own.

Rows are lines of JSON, and those that the file has are not run again.  The log-likelihood is the log of the
mean of 100 (auxiliary) importance weights for each image of one binarised test set; rows of ``published``
have it for every image.  ``--report`` prints means, and the paired differences between posteriors with their
standard errors over the seeds and, of ``published``, over the images.
"""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from benchmarks.common import mnist
from benchmarks.common.results import Clock, Row, checkpoint_of, collect, read, results_of
from benchmarks.measured.images import cif_images as table
from pyro_flowvi import fit
from pyro_flowvi.datasets import digits
from pyro_flowvi.distributions.indexed_flow import log_mean_exp
from pyro_flowvi.infer import TraceAnnealed_ELBO
from pyro_flowvi.models import ConvDecoder, ConvEncoder, FlowVAE, Minibatches, binarize
from pyro_flowvi.transforms import IndexedLayer, LULinear, SplineAutoregressive

KINDS = ("VAE", "NSF", "CIF-NSF")
BATCH = 100
WEIGHTS = 100
COMPARED = 250
"""Validation images of MNIST on which states are compared: with all, that would take as long as the steps."""


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
}
PUBLISHED_LAYERS = 10


def published(layers: int) -> Setting:
    return Setting(20, layers, ((44, 44), (40, 40)), 2)


def size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def check_sizes(setting: Setting, shape: tuple[int, ...]) -> dict[str, int]:
    """The numbers of parameters of the posteriors, those of both flows alike to one percent.

    :raises ValueError: if they are not.
    """
    sizes = {kind: size(setting.build(kind, shape, 0)) for kind in KINDS}
    first, second = sizes["NSF"], sizes["CIF-NSF"]
    if abs(first - second) > 0.01 * first:
        raise ValueError(f"hidden: expected widths that match the parameters, got {sizes}")
    return sizes


@functools.cache
def digit_sets() -> tuple[Tensor, Tensor, Tensor]:
    """Means to train with, and the fixed validation and test sets."""
    return mnist.binarized(digits())


def scores(vae: FlowVAE, test: Tensor, seed: int, *, each: bool = False) -> Row:
    """Means over the images; with ``each`` also the log-likelihood of every one, to a hundredth."""
    pyro.set_rng_seed(1000 + seed)
    weights = vae.log_weights(test, WEIGHTS)
    log_prob = log_mean_exp(weights)
    found: Row = {"test_ll": float(log_prob.mean()), "test_elbo": float(weights.mean())}
    if each:
        found["image_ll"] = [round(value, 2) for value in log_prob.double().tolist()]
    return found


def train(vae: FlowVAE, batches: Minibatches, validation: Tensor, key: Row, **options: Any) -> Row:
    """All steps are taken, and of the averaged weights those kept that have the best validation ELBO."""
    clock, warm_up = Clock(), key["warm_up"]
    result = fit(
        vae.model,
        vae.guide,
        batches=batches,
        validation=validation,
        num_steps=key["steps"],
        lr=key["rate"],
        # A schedule, also a constant one, runs to its end: no posterior gains by when it stops.
        loss=TraceAnnealed_ELBO(
            lambda step: min(1.0, 0.1 + step / warm_up) if warm_up else 1.0, max_plate_nesting=1
        ),
        seed=key["seed"],
        compile=len(list(vae.parameters())) > 20,  # a minute or two, for steps of half the time
        progress=False,
        **options,
    )
    return {
        "parameters": size(vae),
        **clock.read(),
        "steps_taken": len(result.losses),
        "stop_reason": result.stop_reason,
        "skipped": result.num_skipped,
        "restarts": result.num_restarts,
    }


def run_joint(key: Row) -> Row:
    means, validation, test = digit_sets()
    vae = SETTINGS["joint"].build(key["posterior"], (1, 8, 8), key["seed"])
    found = train(vae, Minibatches(means, BATCH, seed=key["seed"]), validation, key)
    return {**found, **scores(vae, test, key["seed"])}


# -- a posterior for a fixed decoder ---------------------------------------------------------------


@functools.cache
def frozen_decoder(steps: int, rate: float, warm_up: int) -> nn.Module:
    means, validation, _ = digit_sets()
    vae = SETTINGS["frozen"].build("VAE", (1, 8, 8), 99)
    key = {"steps": steps, "rate": rate, "warm_up": warm_up, "seed": 99}
    train(vae, Minibatches(means, BATCH, seed=99), validation, key)
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
    means, validation, test = digit_sets()
    decoder = frozen_decoder(key["steps"], key["rate"], key["warm_up"])
    vae = SETTINGS["frozen"].build(key["posterior"], (1, 8, 8), key["seed"])
    vae.decoder = decoder
    found = train(vae, Minibatches(means, BATCH, seed=key["seed"]), validation, key)
    truth = float(log_evidence(decoder, test).mean())
    rows = {**found, **scores(vae, test, key["seed"]), "log_evidence": truth}
    train_set = binarize(means, mnist.FIXED_SET)
    exact = float(log_evidence(decoder, train_set).mean())
    return {
        **rows,
        "gap": truth - rows["test_elbo"],
        "train_gap": exact - float(vae.elbo(train_set, WEIGHTS).mean()),
        "trained": rows["parameters"] - size(decoder),
    }


# -- MNIST -----------------------------------------------------------------------------------------


def run_published(key: Row, whole: mnist.Parts, arguments: argparse.Namespace) -> Row:
    device, kind, seed = arguments.device, key["posterior"], key["seed"]
    means, validation, test = mnist.binarized(whole)
    vae = published(key["layers"]).build(kind, tuple(means.shape[1:]), seed, device)
    found = train(
        vae,
        Minibatches(means.to(device), BATCH, seed=seed),
        validation[:COMPARED].to(device),
        key,
        checkpoint=checkpoint_of(arguments.checkpoints, key),
    )
    return {**found, **scores(vae, test.to(device), seed, each=True)}


def say(row: Row) -> str:
    if "error" in row:
        return f"{row['test']} {row['posterior']} {row['seed']}: {row['error']}"
    gap = f", gap {row['gap']:.4f}" if "gap" in row else ""
    return (
        f"{row['test']:9s} {row['posterior']:8s} seed {row['seed']}: {row['parameters']} parameters, "
        f"ELBO {row['test_elbo']:.3f}, log-likelihood {row['test_ll']:.3f}{gap}, "
        f"{row['cpu_seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", nargs="+", choices=("joint", "frozen"), default=["joint", "frozen"])
    parser.add_argument("--posteriors", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="3000 on digits, 8000 with --data")
    parser.add_argument("--layers", type=int, default=PUBLISHED_LAYERS, help="with --data")
    parser.add_argument("--rate", type=float, help="Adam's rate to start from: 5e-3 on digits, else 1e-3")
    parser.add_argument("--warm-up", type=int, default=0, help="steps of a rising weight of the likelihood")
    parser.add_argument("--data", type=Path, metavar="DIR", help="of MNIST's files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, default=results_of("cif_images"))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is not None:
        print(table(read(arguments.report)))
        return
    on_mnist = arguments.data is not None
    common = {"steps": arguments.steps or (8000 if on_mnist else 3000)}
    common |= {"rate": arguments.rate or (1e-3 if on_mnist else 5e-3), "warm_up": arguments.warm_up}
    data, tests = "digits", arguments.test
    runs: dict[str, Callable[[Row], Row]] = {"joint": run_joint, "frozen": run_frozen}
    if on_mnist:
        whole, tests = mnist.parts(arguments.data), ["published"]
        data, common["layers"] = mnist.name_of(arguments.data, whole), arguments.layers
        runs = {"published": functools.partial(run_published, whole=whole, arguments=arguments)}
        print("parameters:", check_sizes(published(arguments.layers), whole[0].images.shape[1:]))
    keys = [
        {"data": data, "test": test, **common, "posterior": kind, "seed": seed}
        for test in tests
        for seed in range(arguments.seeds)
        for kind in arguments.posteriors
    ]
    collect(keys, arguments.output, lambda key: runs[key["test"]](key), say)
    print(table(read(arguments.output)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
