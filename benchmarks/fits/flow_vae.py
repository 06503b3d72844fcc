"""The bound of a flow VAE against the number of flow layers, as in figure 4 of Rezende and Mohamed.

    python -m benchmarks.fits.flow_vae [--flows planar radial planar_radial] [--layers 0 2 5 10 20 40]
        [--seeds 2] [--steps 2000] [--output FILE] [--figure docs/flow_vae_bound.png]
    python -m benchmarks.fits.flow_vae --report rows.jsonl [--figure docs/flow_vae_bound.png]

Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015, section 6.2, on the digits of
scikit-learn, 8 x 8 pixels with pixel / 16 as the mean, binarised anew for each batch: a fully connected
encoder 64-128-64 and decoder back, 8 latents, planar, radial or alternating layers, all of whose parameters
are outputs of the encoder ("hypernetwork").  Batches of 100, Adam, one particle, path gradients.  For one
seed the initial encoder and decoder and the minibatches are the same for all.

``bound`` is the mean of -ELBO over 400 test images, binarised once, in nats, ``nll`` the same with 100
importance weights.  Rows are lines of JSON, and those that the file has are not run again.
"""

import argparse
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from benchmarks.common.pictures import save
from benchmarks.common.results import Row, collect, read, results_of
from benchmarks.common.tables import markdown
from pyro_flowvi import fit
from pyro_flowvi.datasets import digits
from pyro_flowvi.infer import TraceAnnealed_ELBO
from pyro_flowvi.models import FlowVAE, Minibatches, MLPDecoder, MLPEncoder, binarize

FLOWS = ("planar", "radial", "planar_radial")
TITLES = {"planar": "planar", "radial": "radial", "planar_radial": "both in turn"}
LAYERS = (0, 2, 5, 10, 20, 40)
SHAPE, LATENTS = (1, 8, 8), 8
RATE, BATCH, DRAWS = 5e-3, 100, 100


@functools.cache
def digit_sets() -> tuple[Tensor, Tensor, Tensor]:
    train, validation, test = (torch.from_numpy(part.images / 16).float() for part in digits())
    return train, binarize(validation, 12345), binarize(test, 12345)


def run(key: Row) -> Row:
    means, validation, test = digit_sets()
    pyro.set_rng_seed(key["seed"])
    encoder, decoder = MLPEncoder(SHAPE, (128, 64)), MLPDecoder(LATENTS, SHAPE, (64, 128))
    if key["layers"]:
        vae = FlowVAE(encoder, decoder, key["flow"], num_layers=key["layers"], amortize="hypernetwork")
    else:
        vae = FlowVAE(encoder, decoder)
    started = time.perf_counter()
    result = fit(
        vae.model,
        vae.guide,
        batches=Minibatches(means, BATCH, seed=key["seed"]),
        validation=validation,
        num_steps=key["steps"],
        lr=RATE,
        # With a schedule, also a constant one, all steps are taken.
        loss=TraceAnnealed_ELBO(lambda step: 1.0, max_plate_nesting=1),
        seed=key["seed"],
        progress=False,
    )
    seconds = time.perf_counter() - started
    pyro.set_rng_seed(1000 + key["seed"])
    weights = vae.log_weights(test, DRAWS)
    return {
        "bound": -float(weights.mean()),
        "nll": -float((weights.logsumexp(0) - np.log(DRAWS)).mean()),
        "parameters": sum(param.numel() for param in vae.parameters()),
        "seconds": seconds,
        "skipped": result.num_skipped,
        "restarts": result.num_restarts,
    }


def table(rows: list[Row], score: str) -> dict[str, dict[int, Any]]:
    """By flow and number of layers, the values of all seeds; without layers all flows are one."""
    found: dict[str, dict[int, Any]] = {}
    for flow in FLOWS:
        own = [row for row in rows if row["flow"] == flow or row["layers"] == 0]
        own.sort(key=lambda row: row["layers"])
        if any(row["layers"] for row in own):
            found[flow] = {
                layers: np.array([row[score] for row in group])
                for layers, group in itertools.groupby(own, key=lambda row: row["layers"])
            }
    return found


def report(path: Path, figure: Path | None) -> None:
    rows = [row for row in read(path) if "error" not in row]
    for score in ("bound", "nll"):
        lines = []
        for flow, values in table(rows, score).items():
            cells = []
            for layers in LAYERS:
                found = values.get(layers, np.array([]))
                spread = f" ± {found.std(ddof=1) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
                cells.append(f"{found.mean():.2f}{spread}" if len(found) else "–")
            lines.append([TITLES[flow], *cells])
        print(f"\n{score}\n")
        print(markdown(["flow", *(f"K = {layers}" for layers in LAYERS)], lines))
    if figure is not None:
        draw(rows, figure, path)


def draw(rows: list[Row], path: Path, results: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from pyro_flowvi.plotting import COLOURS

    picture, axes = pyplot.subplots(1, 2, figsize=(8.4, 3.4))
    titles = {"bound": "bound, -ELBO (nats)", "nll": f"-log p(x), {DRAWS} weights (nats)"}
    for axis, (score, title) in zip(axes, titles.items(), strict=True):
        for colour, (flow, values) in zip(COLOURS, table(rows, score).items(), strict=False):
            layers = sorted(values)
            means = np.array([values[k].mean() for k in layers])
            places = np.arange(len(layers))
            axis.plot(places, means, "o-", color=colour, markersize=4, label=TITLES[flow])
            low = np.array([values[k].min() for k in layers])
            high = np.array([values[k].max() for k in layers])
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_xticks(places, [str(k) for k in layers])
        axis.set_xlabel("layers K")
        axis.set_ylabel(title)
    axes[0].legend(fontsize=9)
    picture.tight_layout()
    save(picture, path, results, dpi=110)


def say(row: Row) -> str:
    name = f"{row['flow']:14s} K = {row['layers']:2d}, seed {row['seed']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    return f"{name}: bound {row['bound']:.3f}, -log p(x) {row['nll']:.3f}, {row['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=results_of("flow_vae"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is None:
        keys: list[Row] = []
        for seed in range(arguments.seeds):
            for layers in arguments.layers:
                flows = arguments.flows if layers else ["none"]
                keys += [
                    {"flow": flow, "layers": layers, "seed": seed, "steps": arguments.steps} for flow in flows
                ]
        collect(keys, arguments.output, run, say)
    report(arguments.report or arguments.output, arguments.figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
