"""Sections on posteriors with several modes, and on mixtures of flows."""

from statistics import median as middle

from benchmarks.common.pairs import differences
from benchmarks.common.results import Row
from benchmarks.common.tables import markdown, median, number
from benchmarks.measured.posteriors import grouped, spread
from benchmarks.measured.section import Section

# -- several modes -------------------------------------------------------------------------------


def mass_error(row: Row) -> float:
    return max(abs(mass / true - 1.0) for mass, true in zip(row["masses"], row["true"], strict=True))


def found(row: Row) -> int:
    return sum(mass > 0.2 * true for mass, true in zip(row["masses"], row["true"], strict=True))


def multimodal(rows: list[Row]) -> str:
    lines = []
    for (target, guide), group in grouped(rows, "target", "guide").items():
        done = [row for row in group if "error" not in row]
        name = {"flow": "AutoRealNVP", "auto": 'AutoFlowMixture("auto")'}.get(str(guide), "AutoFlowMixture")
        if not done:
            lines.append([str(target), name, group[0]["error"], *[""] * 6])
            continue
        first = done[0]
        if guide == "auto":
            name += f": {', '.join(map(str, sorted({row['components'] for row in done})))}"
        elif guide != "flow":
            name += f"({first['components']})"
        modes = f"{min(map(found, done))} of {len(first['true'])}" if "masses" in first else "–"
        error = f"{100 * max(map(mass_error, done)):.1f} %" if "masses" in first else "–"
        khats = [row["khat"] for row in done if row["khat"] is not None]
        figures = [
            modes,
            error,
            number(max(khats, default=None)),
            number(median([row["ess"] for row in done])),
        ]
        figures += [number(median([row["elbo"] for row in done]), 3), number(first["evidence"], 3)]
        lines.append([str(target), name, *figures, number(median([row["cpu_seconds"] for row in done]), 1)])
    head = ["posterior", "guide", "modes found", "worst error of a mass", "k-hat", "effective share of draws"]
    return markdown([*head, "ELBO", "best possible", "seconds"], lines)


MULTIMODAL = Section(
    "Are all modes found, and do they have their masses?",
    "benchmarks.mixtures.multimodal",
    "`fit` with nothing set. *two*: five latents, modes 6 standard deviations apart, masses .2 and .8; "
    "*nine*: normals on a lattice; *bananas*: two bent modes, .2 and .8; *labels*: a Gaussian mixture "
    "model, whose labels can be switched in six ways; *shots*: angle and speed of a projectile, from where "
    "it lands; *sixteen*: normals on a lattice, of unlike masses; *unlike*: two normals, one a thirtieth as "
    "wide as the other; *twenty*: three normals in twenty dimensions; *ring*, with three bumps: one mode; "
    "*schools*: one mode. "
    '`AutoFlowMixture("auto")` is followed by the number of components that it found, by seed where they '
    "differ. Worst of the seeds for masses and k-hat, medians else.",
    multimodal,
    picture=("multimodal.png", "One flow and a mixture of flows on five posteriors"),
)


def mode_search(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        each = row["cpu_seconds"] / row["mixtures"]
        found = f"{row['found']} of {row['of']}"
        lines.append(
            [str(row["dim"]), str(row["modes"]), found, f"{row['exact']} of {row['mixtures']}", number(each)]
        )
    head = ["dimensions", "modes", "found", "mixtures with the right number", "seconds of a search"]
    return markdown(head, lines)


MODE_SEARCH = Section(
    'Which modes does the search of `AutoFlowMixture("auto")` find?',
    "benchmarks.mixtures.mode_search",
    "Mixtures of normals with standard deviations from .5 to 1.2 at random places, no two closer than 7, in "
    "a box of which the search knows nothing.",
    mode_search,
)


# -- mixtures of flows ---------------------------------------------------------------------------


def vmonf(rows: list[Row]) -> str:
    lines = []
    for (test,), group in grouped([row for row in rows if "error" not in row], "test").items():
        methods = grouped([one for row in group for one in row["rows"]], "method")
        for (method,), ones in methods.items():
            scores = [[one[name] for one in ones if one[name] is not None] for name in ("accuracy", "nll")]
            seconds = [one["cpu_seconds"] for one in ones if "cpu_seconds" in one]
            accuracy, nll = (number(middle(values), 3) if values else "–" for values in scores)
            taken = number(middle(seconds), 1) if seconds else "–"
            lines.append([str(test), str(method), str(len(ones)), accuracy, nll, taken])
    return markdown(["data", "method", "seeds", "accuracy", "NLL", "seconds"], lines)


VMONF = Section(
    "How do mixtures of flows cluster, beside scikit-learn's?",
    "benchmarks.mixtures.vmonf",
    "Accuracy of the best one-to-one matching on a fresh draw (of the digits: on all images, with labels "
    "on those without one), negative log density of it, medians of the seeds. `FlowMixture` has its "
    "defaults on the drawn data; the digits, in 16 principal components, a weight decay of 1 and noise .5. "
    "*oracle* is the true density.",
    vmonf,
)


OURS = ("FlowMixture", "FlowMixture, half of its start held")
PEERS = ("KMeans", "GaussianMixture", "BayesianGaussianMixture", "LabelSpreading")


def vmonf_mnist(rows: list[Row]) -> str:
    good = [row for row in rows if "error" not in row]
    lines, pairs = [], []
    for (digits, labels), group in grouped(good, "digits", "labels").items():
        test = [f"0 to {int(str(digits)) - 1}", str(labels or "none")]
        methods = grouped([{**one, "seed": row["seed"]} for row in group for one in row["rows"]], "method")
        for (method,), ones in methods.items():
            scores = [spread([one[name] for one in ones], 3) for name in ("accuracy", "nmi")]
            nlls = [one["nll"] for one in ones if one["nll"] is not None]
            seconds = [one["cpu_seconds"] for one in ones if "cpu_seconds" in one]
            figures = [number(middle(nlls)) if nlls else "–", number(middle(seconds), 1) if seconds else "–"]
            lines.append([*test, str(method), str(len(ones)), *scores, *figures])
        for (method,), ones in methods.items():
            if str(method).startswith(PEERS) and ("FlowMixture",) in methods:
                ours = [methods.get((name,), []) for name in OURS]
                told = [paired(each, ones, name) for each in ours for name in ("accuracy", "nmi")]
                pairs.append([*test, str(method), *told])
    if not lines:
        return ""
    head = ["digits", "labels a class", "method", "seeds", "accuracy", "NMI", "NLL", "seconds"]
    less = [
        "digits",
        "labels a class",
        "less",
        "`FlowMixture`: accuracy",
        "NMI",
        "half held: accuracy",
        "NMI",
    ]
    return f"{markdown(head, lines)}\n\n{markdown(less, pairs)}"


def paired(ours: list[Row], theirs: list[Row], name: str) -> str:
    """The mean difference of a score over like seeds, and how many of them are above zero."""
    found = differences(ours, theirs, name)
    if len(found) == 0:
        return "–"
    return f"{found.mean():+.3f} ({(found > 0.0).sum()} of {len(found)} above 0)"


VMONF_MNIST = Section(
    "And on images of MNIST?",
    "benchmarks.mixtures.vmonf_mnist",
    "8,000 images to train with, 1,000 to choose by and 1,000 to test on, cut anew from MNIST's 10,000 test "
    "images for each seed (of the digits 0 to 4 half as many). All methods have the same features, principal "
    "components of the training images, 32 of 16, 24 and 32 on every seed: they make the pixels of "
    "validation images most likely. Accuracy and NMI are of the test images: the best one-to-one matching "
    "without labels, the predicted classes with them; medians (ranges) of the seeds, which have the same "
    "images and labels for each method. `FlowMixture` has the options of scikit-learn's digits, weight decay "
    "1 and noise .5; *wider and longer* are networks 64 wide and 3,000 steps, which the validation images "
    "find more likely. *Its start* is the partition that it chose to begin with, by a vote of ten "
    "neighbours; *half of its start held* is a second fit, to which the parts of a random half of the rows "
    "are given as labels (half: by the classes of validation images of the first seed). The second table has "
    "mean differences over like seeds.\n\n"
    "Pires and Figueiredo (2020) report an accuracy of .757 and an NMI of .660 for the digits 0 to 4 without "
    "labels, trained on the 60,000 images that are not used here. *VMoNF, amortised* is their model (MAF of "
    "5 layers of width 200, q(c | x) of 512, the amortised ELBO, random components) on so few images and "
    "steps: 2,500 of 128 images on the features, 800 on the pixels.",
    vmonf_mnist,
    options="--data DIR",
    picture=("vmonf_mnist.png", "Images drawn from the components of a mixture of flows"),
)


def complexity(rows: list[Row]) -> str:
    lines = []
    for (name, steps), group in grouped(rows, "name", "steps").items():
        accuracy, nll, alive = (middle([row[key] for row in group]) for key in ("accuracy", "nll", "alive"))
        figures = [str(len(group)), f"{steps:,}", number(accuracy, 3), number(nll, 3), f"{alive:g}"]
        lines.append([str(name), *figures])
    return markdown(["components", "seeds", "steps", "accuracy", "NLL", "alive"], lines)


COMPLEXITY = Section(
    "Which components of an amortised mixture survive?",
    "benchmarks.mixtures.vmonf_complexity",
    "Five wings of a pinwheel, no labels, random components; q is the classifier's hidden layers. *Alive* "
    "counts components with more than 2 % of the data. Medians of the seeds.",
    complexity,
    options="--seeds 3 --steps 1000",
)


def topology(rows: list[Row]) -> str:
    lines = []
    for (test,), group in grouped(rows, "test").items():
        accuracies, nlls = ([row[name] for row in group] for name in ("accuracy", "nll"))
        left = ", ".join(str(row["components"]) for row in group)
        lines.append(
            [
                str(test),
                left,
                spread(accuracies, 3),
                spread(nlls),
                spread([r["cpu_seconds"] for r in group], 0),
            ]
        )
    return markdown(["test", "components at the end, by seed", "accuracy", "NLL", "seconds"], lines)


TOPOLOGY = Section(
    "And without a clustering to start from?",
    "benchmarks.mixtures.vmonf_topology",
    "Two circles without labels (*rings*: components over `PolarNormal`; *normal*: splines over a normal "
    "base; *arcs*: sixteen small components, merged to two by their overlap), five wings from random "
    "starts (*wings*), twelve components merged by `annihilate`, and a consistency loss. Medians over the "
    "seeds, with the range.",
    topology,
)


# -- continuously-indexed flows ------------------------------------------------------------------


def cif_mixture(rows: list[Row]) -> str:
    lines = []
    names = ("target", "layers", "base", "tempered", "flow", "steps")
    for key, group in grouped([row for row in rows if "error" not in row], *names).items():
        target, layers, base, tempered, flow, steps = key
        how = [str(target), str(layers), str(base), "yes" if tempered else "no", str(flow), f"{steps:,}"]
        told = [str(len(group)), spread([row["elbo"] for row in group], 3)]
        for suffix in ("", "_resampled"):
            least = min(row[f"least{suffix}"] for row in group)
            told.append(f"{number(least, 3)} to {number(max(row[f'most{suffix}'] for row in group), 3)}")
        lines.append([*how, *told, number(middle([row["cpu_seconds"] for row in group]), 0)])
    head = ["target", "layers", "σ0", "tempered", "flow", "steps", "seeds", "ELBO", "masses of modes"]
    return markdown([*head, "resampled", "seconds"], lines) if lines else ""


CIF_MIXTURE = Section(
    "What do continuous indices gain on islands?",
    "benchmarks.mixtures.cif_mixture",
    "*nine*: normals of standard deviation .25 on a lattice of step 2, each of mass 1/9 = .111 (.110 within "
    "3 standard deviations), of which one alone has an ELBO of -2.20; *rings*: two circles around the "
    "origin, one alone -.69; *cube*: sixteen normals of standard deviation .5 at the corners of a cube "
    "of side 4 in four dimensions, each of mass .0625. The best ELBO is 0. From a base N(0, σ0²), as many "
    "parameters each, 250 draws a step; *default*: `fit` with nothing set. Medians of the seeds with ranges; "
    "masses of the lightest and the heaviest mode of all seeds, of draws as they are and resampled by their "
    "weights.",
    cif_mixture,
    options="--chosen",
    picture=("cif_mixture.png", "Densities of the target and of the fits"),
)

SECTIONS = (MULTIMODAL, MODE_SEARCH, VMONF, VMONF_MNIST, COMPLEXITY, TOPOLOGY, CIF_MIXTURE)
