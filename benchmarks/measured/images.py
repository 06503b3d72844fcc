"""Sections on variational autoencoders of images."""

import math
from statistics import median as middle

import numpy as np

from benchmarks.common.pairs import differences, over_images, standard_error, with_error
from benchmarks.common.results import Row
from benchmarks.common.tables import markdown, nats, number
from benchmarks.measured.posteriors import grouped
from benchmarks.measured.section import Section

FLOW_TITLES = {
    "none": "none",
    "planar": "planar",
    "radial": "radial",
    "planar_radial": "both in turn",
    "nice": "NICE",
}
BOUNDS = {
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
    "less that of fewer",
    "published",
)


def over_seeds_and_images(rows: list[Row], others: list[Row]) -> str:
    """A paired difference of bounds, with its standard errors over the seeds and over groups of images."""
    found = differences(rows, others, "bound")
    if len(found) == 0:
        return "–"
    images = over_images(rows, others, "groups")
    return f"{with_error(found)} (images: ± {standard_error(images):.2f})"


def flow_vae(rows: list[Row]) -> str:
    parts = []
    good = [row for row in rows if "error" not in row]
    for (data, gradient, steps), group in grouped(good, "data", "gradient", "steps").items():
        posteriors = grouped(group, "flow", "layers")
        plain = posteriors.get(("none", 0), [])
        lines, fewer = [], dict[object, list[Row]]()
        for (flow, layers), ones in sorted(posteriors.items(), key=lambda item: order(*item[0])):
            scores = [with_error(np.array([row[score] for row in ones])) for score in SCORES]
            compared = (plain, fewer.get(flow, [])) if layers else ([], [])
            fallen = [over_seeds_and_images(ones, others) for others in compared]
            fewer[flow] = ones
            published = BOUNDS.get(str(flow), {}).get(layers) if data != "digits" else None
            lines.append(
                [FLOW_TITLES[str(flow)], str(layers), str(len(ones)), *scores, *fallen, nats(published, 1)]
            )
        title = f"{data}, {steps:,} steps with {GRADIENTS[str(gradient)]}:"
        parts.append(f"{title}\n\n{markdown(HEAD, lines)}")
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


# -- indices -------------------------------------------------------------------------------------

LOG_LIKELIHOODS = {"VAE": (-87.37, 0.15), "NSF": (-82.95, 0.11), "CIF-NSF": (-82.22, 0.13)}
"""Log-likelihoods of Caterini et al. 2020 on MNIST, after training on 54,000 images, and standard errors."""
LIKELIHOOD_TITLES = {
    "test_ll": "log p(x)",
    "test_elbo": "ELBO",
    "gap": "log p(x) less ELBO",
    "train_gap": "the same in training",
}
PAIRS = (("NSF", "VAE"), ("CIF-NSF", "NSF"))


def published_difference(first: str, second: str) -> str:
    (one, its_error), (other, error) = LOG_LIKELIHOODS[first], LOG_LIKELIHOODS[second]
    return f"{one - other:.2f} ± {math.hypot(its_error, error):.2f}"


def cif_images(rows: list[Row]) -> str:
    parts = []
    good = [{"layers": None, **row} for row in rows if "error" not in row]
    for group in grouped(good, "data", "test", "layers", "steps", "rate", "warm_up").values():
        first, published = group[0], group[0]["test"] == "published"
        scores = [name for name in LIKELIHOOD_TITLES if name in first]
        lines = []
        for (kind,), own in grouped(group, "posterior").items():
            told = [str(kind), f"{own[0]['parameters']:,}", str(len(own))]
            told += [with_error(np.array([row[name] for row in own])) for name in scores]
            told.append(number(middle([row["cpu_seconds"] for row in own]), 0))
            lines.append(
                told + (["{:.2f} ± {:.2f}".format(*LOG_LIKELIHOODS[str(kind)])] if published else [])
            )
        titles = [LIKELIHOOD_TITLES[name] for name in scores]
        head = ["posterior", "parameters", "seeds", *titles, "seconds"]
        layers = f", {first['layers']} layers" if first["layers"] else ""
        name = first["data"] if published else f"{first['data']}, {first['test']}"
        title = f"*{name}*{layers}, {first['steps']:,} steps at {first['rate']:g}:"
        parts += [title, markdown(head + ["published log p(x)"] * published, lines)]
        lines = []
        for pair in PAIRS:
            both = [[row for row in group if row["posterior"] == kind] for kind in pair]
            told = [f"{pair[0]} less {pair[1]}", *(with_error(differences(*both, name)) for name in scores)]
            told.append(with_error(over_images(*both, "image_ll")))
            lines.append(told + [published_difference(*pair)] * published)
        head = ["paired difference", *titles, "log p(x), over images"]
        parts.append(markdown(head + ["published"] * published, lines))
    return "\n\n".join(parts)


CIF_IMAGES = Section(
    "Do indices help the posterior of images?",
    "benchmarks.fits.cif_images",
    "The experiment of Caterini et al. 2020: a convolutional VAE with 20 latents whose posterior is a "
    "normal, autoregressive splines behind it, or these splines continuously indexed, and narrower by so "
    "much that the parameters match to a percent. MNIST's 10,000 test images are cut into 8,000 to train, "
    "1,000 to validate and 1,000 to test; log p(x) is by 100 importance weights for each image. The rate is "
    "the best of four for the normal, by one seed's test images, and none of the flows was tuned. The "
    "published figures are of 54,000 images, 10 layers and up to 1,000 epochs: compare the rows of a table, "
    "not a row with its published figure. Means ± standard errors, over the seeds or over the 1,000 images "
    "of the difference that is averaged over the seeds.",
    cif_images,
    options="--data DIR --layers 5 --steps 5000 --rate 5e-3 --seeds 3",
)

SECTIONS = (FLOW_VAE, CIF_IMAGES)
