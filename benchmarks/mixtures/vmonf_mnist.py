"""Mixtures of flows on images of MNIST, beside scikit-learn's methods from the same features.

    python -m benchmarks.mixtures.vmonf_mnist --data DIR [--seeds 3] [--output vmonf_mnist.jsonl]
    python -m benchmarks.mixtures.vmonf_mnist --report vmonf_mnist.jsonl
    python -m benchmarks.mixtures.vmonf_mnist --data DIR --figure docs/vmonf_mnist.png

``DIR`` has MNIST's four IDX files, or the two of its 10,000 test images, of which a seed makes parts of 8,000
to train with, 1,000 to validate and 1,000 to test.  Tests are the digits 0 to 4 and all ten, without labels,
with 5 and with 20 labels a class; a seed has its own parts, labels and random numbers, which all methods
share.

All methods get the same principal components of the training images: 16, 24 or 32, whichever makes the pixels
of the validation images most likely (a Gaussian mixture of the components, and an isotropic normal for what
they leave out).  No label has a say in this, nor in the options of ``FlowMixture``: weight decay 1 and noise
.5 are those of scikit-learn's digits (``benchmarks.mixtures.vmonf``); "wider and longer" are networks and
steps that make the validation images more likely.

Accuracy and normalised mutual information (NMI) are those of the test images: without labels under the best
one-to-one matching of clusters and classes, with labels of the predicted classes.  NLL is the mean negative
log density of their features.  "its start" is the partition that ``FlowMixture`` chose to begin with, taken
to the test images by a vote of ten neighbours, and EM goes on from that very partition.  "half of its start
held" is a second fit, to which the parts of a random half of the rows are given as labels; that half are held
was chosen by the validation images of the first seed and their classes.

"VMoNF, amortised" is the published model of Pires and Figueiredo, *Variational Mixture of Normalizing Flows*,
2020, on the digits 0 to 4 without labels: MAF of 5 layers of width 200, q(c | x) of one layer of 512, the
amortised ELBO from random components; on the features, and on the pixels as published.  Its steps are cut to
what a core does in minutes.  ``--published-steps``, ``--batch`` and ``--device`` are for more.
"""

import argparse
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.common import mnist
from benchmarks.common.clusterings import (
    Array,
    Labels,
    component_images,
    gaussian_from,
    matched_accuracy,
    peers,
    spreadings,
)
from benchmarks.common.pictures import save
from benchmarks.common.results import Clock, Row, collect, read, results_of
from benchmarks.measured.mixtures import vmonf_mnist
from pyro_flowvi.datasets import hide_labels
from pyro_flowvi.models import FlowMixture, VMoNF
from pyro_flowvi.plotting import plot_images

COLUMNS = (16, 24, 32)
LABELS_EACH = (0, 5, 20)
OPTIONS: Row = {"weight_decay": 1.0, "noise": 0.5}
WIDER: Row = {**OPTIONS, "hidden": (64,), "max_iter": 3000}
STEPS = {"amortised": 2500, "amortised, pixels": 800}
AMORTISED: Row = {"num_layers": 5, "hidden": (200,), "classifier": (512,)}
HOLD = 0.5
VOTERS = 10
LOGIT_MARGIN = 0.05
"""Keeps the logit of pixels from its poles."""
DRAWS_EACH = 10


# -- data ----------------------------------------------------------------------------------------------


def of_digits(part: Any, num: int) -> tuple[Array, Labels]:
    """Pixels from 0 to 1 and classes of the images of the first digits."""
    chosen = part.labels < num
    return part.images[chosen].reshape(int(chosen.sum()), -1) / (part.num_levels - 1.0), part.labels[chosen]


def pixel_nll(pca: PCA, columns: int, train: Array, validation: Array, num: int, seed: int) -> float:
    """Mean negative log density of images: a Gaussian mixture of the components, a normal for the rest.

    :param pca: of at least as many columns.
    """
    z, other = (pca.transform(x)[:, :columns] for x in (train, validation))
    mixture = GaussianMixture(num, random_state=seed, max_iter=500).fit(z)
    left, other_left = (
        ((x - pca.mean_) ** 2).sum(1) - (u**2).sum(1) for x, u in ((train, z), (validation, other))
    )
    size = train.shape[1] - columns
    variance = float(left.mean()) / size
    normal = 0.5 * (size * np.log(2.0 * np.pi * variance) + other_left.mean() / variance)
    return float(normal - mixture.score(other))


class Task:
    """Features of images to fit, the labels that are shown, and features and classes to test on."""

    def __init__(self, whole: mnist.Parts, num: int, each: int, seed: int) -> None:
        (x, self.y), (validation, _), (test, self.test_y) = (of_digits(part, num) for part in whole)
        self.num, self.seed = num, seed
        pca = PCA(max(COLUMNS), random_state=seed).fit(x)
        self.tried = {c: pixel_nll(pca, c, x, validation, num, seed) for c in COLUMNS}
        self.columns = min(self.tried, key=lambda c: self.tried[c])
        self.pca = PCA(self.columns, random_state=seed).fit(x)
        self.z, self.validation_z, self.test_z = (self.pca.transform(part) for part in (x, validation, test))
        self.labels: Labels | None = hide_labels(self.y, each, seed) if each else None

    def scores(self, predicted: Labels) -> Row:
        """Of predictions for the test images."""
        if self.labels is None:
            accuracy = matched_accuracy(self.test_y, predicted)
        else:
            accuracy = float((predicted == self.test_y).mean())
        return {"accuracy": accuracy, "nmi": float(normalized_mutual_info_score(self.test_y, predicted))}


# -- methods -------------------------------------------------------------------------------------------


def flow_row(task: Task, method: str, options: Row, hold: float = 0.0) -> tuple[FlowMixture, Row]:
    """A fit and its scores.

    :param hold: the share of the rows for which the start's part is their label in a second fit.
    """
    clock = Clock()
    flows = FlowMixture(task.num, random_state=task.seed, **options).fit(task.z, task.labels)
    if hold:
        held = np.random.default_rng(task.seed).random(len(task.z)) < hold
        if task.labels is not None:
            held |= task.labels >= 0
        flows.fit(task.z, np.where(held, flows.start_labels_, -1))
    taken = clock.read()
    tried = {each["init"]: round(float(each["held_out_nll"]), 4) for each in flows.starts_}
    row: Row = {"method": method, **task.scores(flows.predict(task.test_z)), "nll": -flows.score(task.test_z)}
    row |= {"validation_nll": -flows.score(task.validation_z), "start": flows.start_, "flow": flows.flow_}
    return flows, {**row, **taken, "tried": tried, "converged": flows.converged_}


def flow_rows(task: Task) -> list[Row]:
    """The flows, the start that the first of them chose, and EM from that start."""
    flows, row = flow_row(task, "FlowMixture", OPTIONS)
    parts = flows.start_labels_
    near = KNeighborsClassifier(VOTERS).fit(task.z, parts).predict(task.test_z)
    gaussians = gaussian_from(task.z, parts, task.num, task.seed)
    rows = [row, {"method": "its start", **task.scores(near), "nll": None}]
    found = task.scores(gaussians.predict(task.test_z))
    nll = -float(gaussians.score(task.test_z))
    rows.append({"method": "GaussianMixture from that start", **found, "nll": nll})
    rows.append(flow_row(task, "FlowMixture, wider and longer", WIDER)[1])
    if task.labels is None:
        rows.append(flow_row(task, "FlowMixture from neighbours", {**OPTIONS, "init": "neighbours"})[1])
    return rows


def peer_rows(task: Task) -> list[Row]:
    """scikit-learn's estimators by themselves: mixtures without labels, label spreading with them."""
    estimators = peers(task.num, task.seed) if task.labels is None else spreadings()
    rows = []
    for method, estimator in estimators.items():
        clock = Clock()
        estimator.fit(task.z, task.labels)
        taken = clock.read()
        scored = "Gaussian" in method
        nll = -float(estimator.score(task.test_z)) if scored else None
        rows.append({"method": method, **task.scores(estimator.predict(task.test_z)), "nll": nll, **taken})
    return rows


# -- the published model -------------------------------------------------------------------------------


def logits(pixels: Array, generator: np.random.Generator) -> Array:
    """Of pixels from 0 to 1, of 256 levels, with uniform noise of a level."""
    share = (255.0 * pixels + generator.random(pixels.shape)) / 256.0
    share = LOGIT_MARGIN + (1.0 - 2.0 * LOGIT_MARGIN) * share
    return np.asarray(np.log(share / (1.0 - share)))


def amortised(
    task: Task, parts: tuple[Array, Array], method: str, steps: int, options: argparse.Namespace
) -> list[Row]:
    """The published model, by its classifier q(c | x) and by p(c | x).

    :param parts: rows to train with, and to test on.
    """
    mean, scale = parts[0].mean(0), parts[0].std(0).clip(1e-3)
    settings: Row = {"dtype": torch.float32, "device": options.device}
    train, test = (torch.as_tensor((x - mean) / scale, **settings) for x in parts)
    clock = Clock()
    pyro.set_rng_seed(task.seed)
    model = VMoNF(task.num, train.shape[1], "maf", "amortized", **AMORTISED).to(**settings)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1))
    generator = np.random.default_rng(task.seed)
    for _ in range(steps):
        index = generator.choice(len(train), options.batch, replace=False)
        svi.step(train[torch.from_numpy(index).to(options.device)])
    taken = clock.read()
    with torch.no_grad():
        by_q = torch.cat([model.classify(rows).argmax(-1) for rows in test.split(500)]).cpu().numpy()
        joint = torch.cat([model.joint_log_prob(rows) for rows in test.split(500)]).double().cpu()
    nll = float(np.log(scale).sum() - joint.logsumexp(-1).mean())
    by_p = joint.argmax(-1).numpy()
    rows: list[Row] = [{"method": f"{method}, by q", **task.scores(by_q), "nll": None}]
    return [*rows, {"method": f"{method}, by p", **task.scores(by_p), "nll": nll, **taken}]


# -- runs ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def parts_of(folder: Path, seed: int) -> mnist.Parts:
    return mnist.parts(folder, seed)


def run(key: Row, options: argparse.Namespace) -> Row:
    whole = parts_of(options.data, key["seed"])
    task = Task(whole, key["digits"], key["labels"], key["seed"])
    told: Row = {"data": mnist.name_of(options.data, whole), "columns": task.columns, "pixel_nll": task.tried}
    if key["methods"] == "flows":
        return {**told, "rows": flow_rows(task)}
    if key["methods"] == "peers":
        return {**told, "rows": peer_rows(task)}
    if key["methods"] == "held":
        return {**told, "rows": [flow_row(task, "FlowMixture, half of its start held", OPTIONS, HOLD)[1]]}
    steps = options.published_steps or STEPS[key["methods"]]
    method, train, test = "VMoNF, amortised", task.z, task.test_z
    if key["methods"] == "amortised, pixels":
        generator = np.random.default_rng(key["seed"])
        train, test = (logits(of_digits(part, key["digits"])[0], generator) for part in (whole[0], whole[2]))
        method += ", of pixels"
    rows = amortised(task, (train, test), method, steps, options)
    if train is not task.z:  # no density of the features
        rows = [{**one, "nll": None} for one in rows]
    return {**told, "steps": steps, "batch": options.batch, "rows": rows}


def keys(seeds: Iterable[int], pixel_seeds: Iterable[int]) -> list[Row]:
    """Flows and their peers of all tests; the published model of the digits 0 to 4 without labels."""
    seeds = list(seeds)
    tests = [(digits, each) for digits in (5, 10) for each in LABELS_EACH]
    found: list[Row] = [
        {"digits": digits, "labels": each, "methods": methods, "seed": seed}
        for seed in seeds
        for digits, each in tests
        for methods in ("flows", "held", "peers")
    ]
    first: Row = {"digits": 5, "labels": 0}
    found += [{**first, "methods": "amortised", "seed": seed} for seed in seeds]
    return [*found, *({**first, "methods": "amortised, pixels", "seed": seed} for seed in pixel_seeds)]


def say(row: Row) -> str:
    head = f"{row['digits']:2d} digits, {row['labels']:2d} labels, seed {row['seed']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    told = [f"{one['method']} {one['accuracy']:.3f} {one['nmi']:.3f}" for one in row["rows"]]
    return f"{head}: {'; '.join(told)} ({row['task_cpu_seconds']:.0f} s)"


def draw(folder: Path, path: Path, results: Path) -> None:
    """Draws of the components of ten digits with the most labels, from the first seed."""
    task = Task(mnist.parts(folder, 0), 10, max(LABELS_EACH), 0)
    flows, _ = flow_row(task, "FlowMixture", OPTIONS)
    torch.manual_seed(0)
    images = component_images(flows, task.pca, DRAWS_EACH, int(task.pca.n_features_in_**0.5))
    names = [str(label) for label in flows.component_labels_]
    save(plot_images(images, DRAWS_EACH, names).figure, path, results, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="of MNIST's IDX files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixel-seeds", type=int, default=1, help="of the published model on pixels")
    parser.add_argument("--published-steps", type=int, help=f"by default {STEPS}")
    parser.add_argument("--batch", type=int, default=128, help="of the published model")
    parser.add_argument("--device", default="cpu", help="of the published model")
    parser.add_argument("--output", type=Path, default=results_of("vmonf_mnist"))
    parser.add_argument("--figure", type=Path, help="draws of the components; measures nothing")
    parser.add_argument("--report", type=Path, help="shows the table of a file")
    options = parser.parse_args()
    if options.report is None and options.data is None:
        parser.error("expected --data or --report")
    if options.figure is not None:
        draw(options.data, options.figure, options.output)
        return
    if options.report is None:
        tasks = keys(range(options.seeds), range(options.pixel_seeds))
        collect(tasks, options.output, lambda key: run(key, options), say)
    print(vmonf_mnist(read(options.report or options.output)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
