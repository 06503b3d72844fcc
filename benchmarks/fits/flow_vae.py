"""The bound of a flow VAE against the number of flow layers, as in figure 4 of Rezende and Mohamed.

    python -m benchmarks.fits.flow_vae [--flows planar radial planar_radial nice] [--layers 0 2 5 10 20 40]
        [--seeds 2] [--steps 2000] [--output FILE] [--figure docs/flow_vae_bound.png]
    python -m benchmarks.fits.flow_vae --data DIR [--layers 0 10 40] [--seeds 3] [--steps 4000]
        [--gradient usual] [--checkpoints DIR]
    python -m benchmarks.fits.flow_vae --report rows.jsonl [--figure docs/flow_vae_bound.png]

Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015, section 6.2.  Images are binarised
anew for each batch of 100.  Planar, radial or alternating layers, all of whose parameters are outputs of
the encoder ("hypernetwork"); the couplings of NICE have networks of their own, the same for all images.
Adam, one particle.  For one seed the initial encoder and decoder and the minibatches are the same for all.

``--gradient`` is "path", by default on the digits, or "usual", that of ``Trace_ELBO``, which the paper has.
On MNIST path gradients end lower, but for ten planar layers: where one nearly flattens a direction, the
score along the path has spikes.

- without ``--data``: the digits of scikit-learn, 8 x 8 pixels with pixel / 16 as the mean; a fully connected
  encoder 64-128-64 and decoder back, 8 latents;
- ``--data DIR``: MNIST's files, or its 10,000 test images alone in parts of 8,000, 1,000 and 1,000; one
  convolution of 8 channels and a linear layer, and back, 20 latents.  The paper has 60,000 images, larger
  networks, 40 latents and 500,000 updates.

``bound`` is the mean of -ELBO over the test images, binarised once, in nats, ``nll`` the same with 100
importance weights; ``train_bound`` that of 1,000 training images.  ``groups`` are means of ``bound`` over the
test images by fifties, for paired differences over images.  Rows are lines of JSON, and those that the file
has are not run again; with ``--checkpoints`` a run that was stopped goes on where it was.
"""

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from benchmarks.common import mnist
from benchmarks.common.pairs import differences, standard_error
from benchmarks.common.pictures import save
from benchmarks.common.results import Clock, Row, checkpoint_of, collect, read, results_of
from benchmarks.measured.images import FLOW_TITLES
from benchmarks.measured.images import flow_vae as table
from pyro_flowvi import fit
from pyro_flowvi.datasets import digits
from pyro_flowvi.infer import TraceAnnealed_ELBO
from pyro_flowvi.models import (
    ConvDecoder,
    ConvEncoder,
    FlowVAE,
    Minibatches,
    MLPDecoder,
    MLPEncoder,
    binarize,
)

FLOWS = ("planar", "radial", "planar_radial", "nice")
BATCH, DRAWS, GROUP = 100, 100, 50
TRAIN_IMAGES, TRAIN_DRAWS = 1000, 20


@dataclass(frozen=True)
class Setting:
    """What is trained on one set of images.

    :param latents: their number.
    :param convolutions: whether the networks are convolutions, or else fully connected.
    :param rate: of Adam, from which it falls along a cosine.
    :param validation: images on which states are compared.
    :param layers: numbers of layers to compare.
    """

    latents: int
    convolutions: bool
    rate: float
    validation: int
    layers: tuple[int, ...]
    steps: int
    seeds: int
    gradient: str

    def networks(self, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
        if self.convolutions:
            return ConvEncoder(shape, 2 * self.latents), ConvDecoder(self.latents, shape)
        return MLPEncoder(shape, (128, 64)), MLPDecoder(self.latents, shape, (64, 128))


DIGITS = Setting(8, False, 5e-3, 100, (0, 2, 5, 10, 20, 40), 2000, 2, "path")
MNIST = Setting(20, True, 6e-3, 250, (0, 10, 40), 4000, 3, "usual")


@functools.cache
def image_sets(folder: Path | None) -> tuple[str, Tensor, Tensor, Tensor]:
    """A name, means to train with, and the binarised validation and test set."""
    parts = digits() if folder is None else mnist.parts(folder)
    name = "digits" if folder is None else mnist.name_of(folder, parts)
    return name, *mnist.binarized(parts)


def run(key: Row, folder: Path | None, checkpoints: Path | None) -> Row:
    _, means, validation, test = image_sets(folder)
    setting = DIGITS if folder is None else MNIST
    pyro.set_rng_seed(key["seed"])
    encoder, decoder = setting.networks(tuple(means.shape[1:]))
    if key["layers"]:
        amortize: Any = "base" if key["flow"] == "nice" else "hypernetwork"
        vae = FlowVAE(encoder, decoder, key["flow"], num_layers=key["layers"], amortize=amortize)
    else:
        vae = FlowVAE(encoder, decoder)
    clock = Clock()
    result = fit(
        vae.model,
        vae.guide,
        batches=Minibatches(means, BATCH, seed=key["seed"]),
        validation=validation[: setting.validation],
        num_steps=key["steps"],
        lr=setting.rate,
        # With a schedule, also a constant one, all steps are taken.
        loss=TraceAnnealed_ELBO(lambda step: 1.0, path=key["gradient"] == "path", max_plate_nesting=1),
        seed=key["seed"],
        checkpoint=checkpoint_of(checkpoints, key),
        compile=key["layers"] > 0,
        progress=False,
    )
    taken = clock.read()
    pyro.set_rng_seed(1000 + key["seed"])
    weights = vae.log_weights(test, DRAWS)
    bounds = -weights.mean(0)
    seen = vae.elbo(binarize(means[:TRAIN_IMAGES], mnist.FIXED_SET), TRAIN_DRAWS)
    return {
        "bound": float(bounds.mean()),
        "nll": -float((weights.logsumexp(0) - math.log(DRAWS)).mean()),
        "train_bound": -float(seen.mean()),
        "groups": [round(float(group.mean()), 3) for group in bounds.split(GROUP)],
        "parameters": sum(param.numel() for param in vae.parameters()),
        "skipped": result.num_skipped,
        "restarts": result.num_restarts,
        **taken,
    }


def draw(rows: list[Row], path: Path, results: Path) -> None:
    """Bounds by the number of layers, and paired differences from those without, with two standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from pyro_flowvi.plotting import COLOURS

    picture, axes = pyplot.subplots(1, 2, figsize=(8.4, 3.4))
    plain = [row for row in rows if row["layers"] == 0]
    flows = [flow for flow in FLOWS if any(row["flow"] == flow for row in rows)]
    layers = sorted({row["layers"] for row in rows})
    for place, (colour, flow) in enumerate(zip(COLOURS, flows, strict=False)):
        own = [row for row in rows if row["flow"] in ("none", flow)]
        groups = [[row for row in own if row["layers"] == k] for k in layers]
        # Beside one another, so that bars do not hide each other.
        across = np.arange(len(layers)) + 0.06 * (place - (len(flows) - 1) / 2)
        bounds = [np.array([row["bound"] for row in group]) for group in groups]
        fallen = [differences(group, plain, "bound") for group in groups]
        for axis, values in zip(axes, (bounds, fallen), strict=True):
            errors = [2.0 * standard_error(each) for each in values]
            look: Row = {"color": colour, "markersize": 4, "capsize": 2, "label": FLOW_TITLES[flow]}
            axis.errorbar(across, [each.mean() for each in values], errors, fmt="o-", **look)
    axes[0].set_ylabel("bound, -ELBO (nats)")
    axes[1].set_ylabel("less the bound without layers")
    for axis in axes:
        axis.set_xticks(range(len(layers)), [str(k) for k in layers])
        axis.set_xlabel("layers K")
    axes[0].legend(fontsize=9)
    picture.tight_layout()
    save(picture, path, results, dpi=110)


def say(row: Row) -> str:
    name = f"{row['flow']:14s} K = {row['layers']:2d}, {row['gradient']} gradient, seed {row['seed']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    return f"{name}: bound {row['bound']:.3f}, -log p(x) {row['nll']:.3f}, {row['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="of MNIST's files")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--layers", nargs="+", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--gradient", choices=("path", "usual"))
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="to go on from")
    parser.add_argument("--output", type=Path, default=results_of("flow_vae"))
    parser.add_argument("--figure", type=Path, help="of the last line's data and gradient")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is None:
        setting = DIGITS if arguments.data is None else MNIST
        common = {"data": image_sets(arguments.data)[0], "gradient": arguments.gradient or setting.gradient}
        common |= {"steps": arguments.steps or setting.steps}
        keys: list[Row] = [
            {**common, "flow": flow if layers else "none", "layers": layers, "seed": seed}
            for seed in range(arguments.seeds or setting.seeds)
            for layers in arguments.layers or setting.layers
            for flow in (arguments.flows if layers else FLOWS[:1])
        ]
        fitted = functools.partial(run, folder=arguments.data, checkpoints=arguments.checkpoints)
        collect(keys, arguments.output, fitted, say)
    results = arguments.report or arguments.output
    rows = [row for row in read(results) if "error" not in row]
    print(table(rows))
    if arguments.figure is not None:
        wanted = rows[-1]["data"], rows[-1]["gradient"]
        draw([row for row in rows if (row["data"], row["gradient"]) == wanted], arguments.figure, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
