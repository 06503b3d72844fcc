"""Sections on posteriors with several modes, and on mixtures of flows."""

from statistics import median as middle

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
        elbo, least = (number(middle([row[name] for row in group]), 3) for name in ("elbo", "least"))
        lines.append(
            [*how, str(len(group)), elbo, least, number(middle([row["cpu_seconds"] for row in group]), 0)]
        )
    head = [
        "target",
        "layers",
        "σ0",
        "tempered",
        "flow",
        "steps",
        "seeds",
        "ELBO",
        "lightest mode",
        "seconds",
    ]
    return markdown(head, lines) if lines else ""


CIF_MIXTURE = Section(
    "What do continuous indices gain on islands?",
    "benchmarks.mixtures.cif_mixture",
    "Normals of standard deviation .25 on a lattice of step 2, from a base N(0, σ0²), as many parameters "
    "each; the best ELBO is 0. Medians of the seeds.",
    cif_mixture,
    picture=("cif_mixture.png", "Densities of the target and of the fits"),
)


SECTIONS = (MULTIMODAL, MODE_SEARCH, VMONF, COMPLEXITY, TOPOLOGY, CIF_MIXTURE)
