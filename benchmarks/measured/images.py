"""Sections on variational autoencoders of images."""

import numpy as np

from benchmarks.common.pairs import Array, differences, standard_error, with_error
from benchmarks.common.results import Row
from benchmarks.common.tables import markdown, nats
from benchmarks.measured.posteriors import grouped
from benchmarks.measured.section import Section

FLOW_TITLES = {
    "none": "none",
    "planar": "planar",
    "radial": "radial",
    "planar_radial": "both in turn",
    "nice": "NICE",
}
PUBLISHED = {
    "none": {0: 89.9},
    "planar": {10: 87.5, 20: 86.5, 40: 85.7, 80: 85.1},
    "nice": {10: 88.6, 20: 87.9, 40: 87.3, 80: 87.2},
}
"""Bounds on -log p(x) of MNIST, nats: Rezende and Mohamed 2015, table 2, from 60,000 images."""


GRADIENTS = {"usual": "the gradient of `Trace_ELBO`", "path": "path gradients"}
SCORES = ("bound", "nll", "train_bound")
HEAD = (
    "flow",
    "layers",
    "seeds",
    "bound",
    "−log p(x)",
    "bound in training",
    "less that without",
    "published",
)


def over_seeds_and_images(rows: list[Row], others: list[Row]) -> str:
    """A paired difference of bounds, with its standard errors over the seeds and over groups of images."""
    found = differences(rows, others, "bound")
    if len(found) == 0:
        return "–"
    images: Array = differences(rows, others, "groups").mean(0)
    return f"{with_error(found)} (images: ± {standard_error(images):.2f})"


def flow_vae(rows: list[Row]) -> str:
    parts = []
    good = [row for row in rows if "error" not in row]
    for (data, gradient, steps), group in grouped(good, "data", "gradient", "steps").items():
        posteriors = grouped(group, "flow", "layers")
        plain = posteriors.get(("none", 0), [])
        lines = []
        for (flow, layers), ones in sorted(posteriors.items(), key=lambda item: order(*item[0])):
            scores = [with_error(np.array([row[score] for row in ones])) for score in SCORES]
            fallen = over_seeds_and_images(ones, plain) if layers else "–"
            published = PUBLISHED.get(str(flow), {}).get(layers) if data != "digits" else None
            lines.append(
                [FLOW_TITLES[str(flow)], str(layers), str(len(ones)), *scores, fallen, nats(published, 1)]
            )
        title = f"{data}, {steps:,} steps with {GRADIENTS[str(gradient)]}:"
        parts.append(f"{title}\n\n{markdown([*HEAD, 'published'], lines)}")
    return "\n\n".join(parts)


def order(flow: object, layers: object) -> tuple[int, object]:
    return list(FLOW_TITLES).index(str(flow)), layers


FLOW_VAE = Section(
    "How does the bound of a flow VAE fall with its layers?",
    "benchmarks.fits.flow_vae",
    "Figure 4 of Rezende and Mohamed: bounds on −log p(x) of test images, in nats, the lower the better; "
    "parameters of planar and radial layers from the encoder, networks of NICE the same for all images. "
    "Means of the seeds ± standard errors; differences are paired by the seed, which sets the first encoder "
    "and decoder and the minibatches, with the standard error over the seeds and that over test images. "
    "*Published*: theirs, from 60,000 images with larger networks, 40 latents and 500,000 updates.",
    flow_vae,
    options="--data DIR",
    picture=("flow_vae_bound.png", "Bound on −log p(x) against the number of layers"),
)

SECTIONS = (FLOW_VAE,)
