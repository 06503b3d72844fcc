"""Mixtures of flows beside scikit-learn's mixtures: clustering, density and few labels.

    python -m benchmarks.mixtures.vmonf [--tests pinwheel5 ...] [--seeds 5] [--output vmonf.jsonl]
    python -m benchmarks.mixtures.vmonf --report vmonf.jsonl
    python -m benchmarks.mixtures.vmonf --tests digits5 --picture digits.png

- ``pinwheel5``, ``pinwheel3``: 512 points of each wing, no labels.
- ``circles``: 512 points of each of two thin circles, no labels; ``circles32``: 1024 points without and 32
  with a label.
- ``digits5``, ``digits10``: scikit-learn's digits 0 to 4 and 0 to 9, no labels; ``digits5_labels`` and
  ``digits10_labels``: five labels for each class, ten draws of labels at least.

Accuracy is that of the best one-to-one matching of clusters and classes on a fresh draw of the test data (of
the digits: on all images; with labels: of the predicted classes, on the images without a label).  NLL is the
mean negative log density of the test draw; of the digits, that of a fifth of the images, by a fit to the
others.

``FlowMixture`` has its defaults on the drawn data; on the digits, which all methods get as their
first 16 principal components, weight decay 1 and noise .5.  Beside it, each from the same data and seed: the
start that it chose, before any flow was trained; a Gaussian mixture by EM from that very start; and
scikit-learn's estimators by themselves, with ten restarts where they restart.  "LabelSpreading" is
scikit-learn's with its kNN kernel at alpha = .2, its default, and .99.

MNIST, with the published experiment, is in ``benchmarks.mixtures.vmonf_mnist``.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from benchmarks.common.clusterings import (
    Array,
    Labels,
    component_images,
    gaussian_from,
    matched_accuracy,
    peers,
    spreadings,
)
from benchmarks.common.pairs import differences, with_error
from benchmarks.common.results import Clock, Row, collect, read, results_of
from benchmarks.common.tables import markdown, median
from pyro_flowvi.datasets import (
    hide_labels,
    pinwheel,
    pinwheel_log_prob,
    two_circles,
    two_circles_log_prob,
)
from pyro_flowvi.models import FlowMixture
from pyro_flowvi.plotting import plot_images

TESTS = (
    "pinwheel5",
    "pinwheel3",
    "circles",
    "circles32",
    "digits5",
    "digits10",
    "digits5_labels",
    "digits10_labels",
)
LABEL_DRAWS = 10
COLUMNS = 16
DIGITS_OPTIONS: Row = {"weight_decay": 1.0, "noise": 0.5}
TARGETS = {
    "pinwheel5": (0.99, -1.08),
    "pinwheel3": (0.99, -1.08),
    "circles": (0.99, -1.8),
    "circles32": (0.995, -1.8),
    "digits5": (0.955, None),
    "digits10": (0.84, None),
    "digits5_labels": (0.965, None),
    "digits10_labels": (0.93, None),
}
SAMPLES_EACH = 10


# -- data ----------------------------------------------------------------------------------------------


class Data:
    """Points to fit, their classes, the labels that are shown, and points to test on."""

    def __init__(self, test: str, seed: int) -> None:
        self.semi = test.endswith(("_labels", "32"))
        self.oracle: Callable[[Array], Array] | None = None
        if test.startswith("digits"):
            self.num = int(test.removesuffix("_labels")[6:])
            pixels, y = load_digits(return_X_y=True)
            self.x, self.y = pixels[y < self.num] / 16.0, y[y < self.num]
            self.options = dict(DIGITS_OPTIONS)
            order = np.random.default_rng(seed).permutation(len(self.x))
            self.held_out, self.rest = np.split(order, [len(order) // 5])
            self.pca = PCA(COLUMNS, random_state=0).fit(self.x)
            self.z: Array = self.pca.transform(self.x)
            self.test_z, self.test_y = self.z, self.y
        else:
            if test.startswith("pinwheel"):
                self.num = int(test[8:])
                draw = functools.partial(pinwheel, 512, self.num)
                self.oracle = functools.partial(pinwheel_log_prob, num_classes=self.num)
            else:
                self.num, draw = 2, functools.partial(two_circles, 528 if self.semi else 512)
                self.oracle = two_circles_log_prob
            self.z, self.y = draw(seed=seed)
            self.test_z, self.test_y = draw(seed=seed + 10_000)
            self.options = {}
        each = 5 if test.startswith("digits") else 16
        self.labels: Labels | None = hide_labels(self.y, each, seed) if self.semi else None

    @property
    def digits(self) -> bool:
        return hasattr(self, "pca")

    def accuracy(self, predicted: Labels) -> float:
        """Of predictions for the points to test on."""
        if self.semi:
            seen = self.labels >= 0 if self.digits else np.zeros(len(predicted), dtype=bool)
            return float((predicted == self.test_y)[~seen].mean())
        return matched_accuracy(self.test_y, predicted)


# -- methods -------------------------------------------------------------------------------------------


def flow_rows(data: Data, seed: int, picture: Path | None) -> list[Row]:
    """The flows, their start, and EM from that start."""

    def mixture() -> FlowMixture:
        return FlowMixture(data.num, random_state=seed, **data.options)

    clock = Clock()
    flows = mixture().fit(data.z, data.labels)
    taken = clock.read()
    parts = flows.start_labels_
    gaussians = gaussian_from(data.z, parts, data.num, seed)
    if data.digits and not data.semi:
        rest = data.z[data.rest]
        other = mixture().fit(rest)
        flow_nll = -other.score(data.z[data.held_out])
        normal = gaussian_from(rest, other.start_labels_, data.num, seed)
        normal_nll: float | None = -float(normal.score(data.z[data.held_out]))
    elif data.digits:
        flow_nll = normal_nll = None
    else:
        flow_nll, normal_nll = -flows.score(data.test_z), -float(gaussians.score(data.test_z))
    if picture is not None:
        draw_digits(flows, data, picture)
    same = data.y if data.digits else None
    start_accuracy = data.accuracy(parts) if same is not None else matched_accuracy(data.y, parts)
    common: Row = {"start": flows.start_, "flow": flows.flow_}
    tried = {each["init"]: round(float(each["held_out_nll"]), 4) for each in flows.starts_}
    return [
        {
            "method": "FlowMixture",
            **common,
            "accuracy": data.accuracy(flows.predict(data.test_z)),
            "nll": flow_nll,
            **taken,
            "tried": tried,
            "converged": flows.converged_,
        },
        {"method": "its start", **common, "accuracy": start_accuracy, "nll": None},
        {
            "method": "GaussianMixture from that start",
            **common,
            "accuracy": data.accuracy(gaussians.predict(data.test_z)),
            "nll": normal_nll,
        },
    ]


def peer_rows(data: Data, seed: int) -> list[Row]:
    """scikit-learn's estimators by themselves."""
    rows = []
    z, test = data.z, data.test_z
    for name, peer in peers(data.num, seed).items():
        clock = Clock()
        peer.fit(z)
        taken = clock.read()
        clusters = peer.predict(test)
        if data.semi:
            hidden = data.labels < 0 if data.digits else np.ones(len(clusters), dtype=bool)
            accuracy = matched_accuracy(data.test_y[hidden], clusters[hidden])
        else:
            accuracy = data.accuracy(clusters)
        nll = -float(peer.score(test)) if name != "KMeans" and not data.digits else None
        rows.append({"method": name, "accuracy": accuracy, "nll": nll, **taken})
    for name, spreading in spreadings().items() if data.semi else ():
        clock = Clock()
        spreading.fit(data.z, data.labels)
        predicted = spreading.transduction_ if data.digits else spreading.predict(data.test_z)
        accuracy = data.accuracy(predicted)
        taken = clock.read()
        rows.append({"method": name, "accuracy": accuracy, "nll": None, **taken})
    if data.oracle is not None:
        rows.append({"method": "oracle", "accuracy": None, "nll": -float(data.oracle(data.test_z).mean())})
    return rows


def run(key: Row, picture: Path | None) -> Row:
    data = Data(key["test"], key["seed"])
    wanted = picture if key["test"] == "digits5" and key["seed"] == 0 else None
    return {"rows": flow_rows(data, key["seed"], wanted) + peer_rows(data, key["seed"])}


def draw_digits(flows: FlowMixture, data: Data, path: Path) -> None:
    """A row of draws of each component, in the order of the class that most of its images have."""
    images = component_images(flows, data.pca, SAMPLES_EACH, 8).reshape(data.num, SAMPLES_EACH, 8, 8)
    components = flows.predict(data.z)
    classes = [int(np.bincount(data.y[components == k], minlength=1).argmax()) for k in range(data.num)]
    order = np.argsort(classes, kind="stable")
    names = [str(classes[k]) for k in order]
    plot_images(images[order].reshape(-1, 8, 8), SAMPLES_EACH, names).figure.savefig(path, dpi=150)
    print(f"wrote {path}")


# -- report --------------------------------------------------------------------------------------------


def shown(values: list[float | None], digits: int) -> str:
    if all(value is None for value in values):
        return "–"
    return f"{median(values):.{digits}f}"


def report(path: Path) -> None:
    good = [row for row in read(path) if "error" not in row]
    lines, pairs = [], []
    for test in TESTS:
        found = [row for row in good if row["test"] == test]
        if not found:
            continue
        bound, nll_bound = TARGETS[test]
        methods: dict[str, list[Row]] = {}
        for row, one in itertools.chain.from_iterable(((r, o) for o in r["rows"]) for r in found):
            methods.setdefault(one["method"], []).append({**one, "seed": row["seed"]})
        for method, rows in methods.items():
            accuracies = [one["accuracy"] for one in rows]
            spread = "–"
            if None not in accuracies:
                spread = f"{min(accuracies):.3f} to {max(accuracies):.3f}"
            target = ""
            if method == "FlowMixture":
                target = f"{bound}" + ("" if nll_bound is None else f", {nll_bound}")
            which = sorted({f"{one['start']}, {one['flow']}" for one in rows if "start" in one})
            seconds = [one["seconds"] for one in rows if "seconds" in one]
            lines.append(
                [
                    test,
                    method,
                    str(len(rows)),
                    shown(accuracies, 4),
                    spread,
                    shown([one["nll"] for one in rows], 3),
                    target,
                    "; ".join(which) if method == "FlowMixture" else "",
                    f"{np.median(seconds):.0f}" if seconds else "",
                ]
            )
        pairs += paired(test, methods)
    head = ["test", "method", "runs", "accuracy", "range", "NLL", "target", "start, flow", "s"]
    print(markdown(head, lines))
    print()
    print(markdown(["FlowMixture less EM from its start", "accuracy", "NLL"], pairs))


def paired(test: str, methods: dict[str, list[Row]]) -> list[list[str]]:
    ours, theirs = methods["FlowMixture"], methods["GaussianMixture from that start"]
    return [[test, *(with_error(differences(ours, theirs, score), 4, "+") for score in ("accuracy", "nll"))]]


def say(row: Row) -> str:
    if "error" in row:
        return f"{row['test']} {row['seed']}: {row['error']}"
    lines = []
    for one in row["rows"][:3]:
        nll = "" if one["nll"] is None else f", NLL {one['nll']:.4f}"
        lines.append(f"{one['method']} {one['accuracy']:.4f}{nll}")
    first = row["rows"][0]
    return (
        f"{row['test']:15s} seed {row['seed']}: {'; '.join(lines)} "
        f"({first['start']}, {first['flow']}, {first['seconds']:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=results_of("vmonf"))
    parser.add_argument("--picture", type=Path, help="draws of each component of the digits 0 to 4")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is not None:
        report(arguments.report)
        return
    first = arguments.first_seed
    keys = [
        {"test": test, "seed": seed}
        for test in arguments.tests
        for seed in range(
            first, first + (max(arguments.seeds, LABEL_DRAWS) if "_labels" in test else arguments.seeds)
        )
    ]
    collect(keys, arguments.output, lambda key: run(key, arguments.picture), say)
    report(arguments.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
