"""Posteriors with several modes: a mixture of flows beside one flow; and two posteriors with one mode.

    python -m benchmarks.mixtures.multimodal [--targets nine ...] [--guides mixture ...] [--seeds 3]
        [--output m.jsonl]
    python -m benchmarks.mixtures.multimodal --report m.jsonl [--figure docs/multimodal.png]
    python -m benchmarks.mixtures.multimodal --targets kidiq --data CLONE    # needs the files of posteriordb

Targets are those of ``targets.py``.

Guides: *flow* is ``AutoRealNVP``, *mixture* ``AutoFlowMixture`` with a component for each mode (four where
there is one mode), *auto* with as many as it finds, *four* with the default of four, each by ``fit`` with
nothing set.

The table has medians over the seeds and, of the masses, the worst relative error of all modes and seeds; the
seconds are those of a processor, the search for the start included.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_flowvi
from benchmarks.common.pictures import save
from benchmarks.common.results import Clock, Row, collect, read, results_of
from benchmarks.common.tables import markdown, median, number
from benchmarks.mixtures.targets import TARGETS, Target, kidiq
from pyro_flowvi import AutoFlowMixture, AutoRealNVP
from pyro_flowvi.psis import effective_sample_size, psis

NUM_DRAWS = 40_000
GUIDES = ("auto", "mixture", "four", "flow")
SHOWN = 1000
"""Draws in the picture."""

# -- fits --------------------------------------------------------------------------------------------


def make_guide(name: str, target: Target) -> Any:
    if name == "flow":
        return AutoRealNVP(target.model)
    if name == "auto":
        return AutoFlowMixture(target.model, "auto")
    return AutoFlowMixture(target.model, 4 if name == "four" else len(target.masses) or 4)


def fit_one(targets: dict[str, Callable[[], Target]], key: Row) -> Row:
    """Trains one guide and looks at its draws."""
    target = targets[key["target"]]()
    pyro.clear_param_store()
    pyro.set_rng_seed(key["seed"])
    guide = make_guide(key["guide"], target)
    clock = Clock()
    result = pyro_flowvi.fit(target.model, guide, *target.args, seed=key["seed"], progress=False)
    taken = clock.read()
    density = guide.density(*target.args)
    with torch.no_grad():
        z, log_q = guide.get_posterior().rsample_and_log_prob((NUM_DRAWS,))
        log_p = torch.cat([density.log_density(part) for part in z.split(4000)])
        sites = density.packing.constrain(z)
    weights = (log_p - log_q).double().numpy()
    row = {
        "elbo": float(weights.mean()),
        "elbo_se": float(weights.std()) / math.sqrt(NUM_DRAWS),
        "khat": psis(weights)[1],
        "ess": effective_sample_size(weights) / NUM_DRAWS,
        **taken,
        "steps": len(result.losses),
        "start": result.start,
        "components": getattr(guide, "num_components", 1),
        "evidence": target.evidence,
    }
    if target.mode_of is not None:
        modes = target.mode_of(sites)
        row["masses"] = (torch.bincount(modes, minlength=len(target.masses)) / NUM_DRAWS).tolist()
        row["true"] = list(target.masses)
    if target.axes is not None:
        row["shown"] = np.round(target.axes(sites)[:SHOWN].numpy(), 2).tolist() if key["seed"] == 0 else None
    return row


def mass_error(row: Row) -> float:
    """The worst relative error of a mode's mass."""
    return max(abs(mass / true - 1.0) for mass, true in zip(row["masses"], row["true"], strict=True))


def num_found(row: Row) -> int:
    return sum(mass > 0.2 * true for mass, true in zip(row["masses"], row["true"], strict=True))


def say(row: Row) -> str:
    name = f"{row['target']} {row['guide']} seed {row['seed']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    masses = f"worst mass error {mass_error(row):.3f}, " if "masses" in row else ""
    return (
        f"{name}: ELBO {row['elbo']:.3f}, {masses}k-hat {number(row['khat'])}, ESS {row['ess']:.3f}, "
        f"{row['steps']} steps, {row['cpu_seconds']:.1f} s of one core"
    )


# -- report ------------------------------------------------------------------------------------------


def report(rows: list[Row]) -> None:
    head = ["target", "guide", "K", "modes found", "worst mass error", "k-hat, worst", "ESS", "ELBO"]
    head += ["log evidence", "steps", "seconds of a core", "seeds"]
    lines = []
    for target, guide in itertools.product([*TARGETS, "kidiq"], GUIDES):
        group = [r for r in rows if r["target"] == target and r["guide"] == guide and "error" not in r]
        if not group:
            continue
        has_modes = "masses" in group[0]
        lines.append(
            [
                target,
                guide,
                str(group[0]["components"]),
                f"{min(map(num_found, group))} of {len(group[0]['true'])}" if has_modes else "–",
                f"{100.0 * max(map(mass_error, group)):.1f} %" if has_modes else "–",
                number(max(r["khat"] if r["khat"] is not None else -math.inf for r in group)),
                number(median([r["ess"] for r in group]), 3),
                number(median([r["elbo"] for r in group]), 3),
                number(group[0]["evidence"], 3),
                number(median([r["steps"] for r in group]), 0),
                number(median([r["cpu_seconds"] for r in group]), 1),
                str(len(group)),
            ]
        )
    print(markdown(head, lines))


def plot(rows: list[Row], path: Path, results: Path) -> None:
    """Draws of one flow and of the mixture that finds its number of components, of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {(r["target"], r["guide"]): r for r in rows if r.get("shown")}
    names = [name for name in TARGETS if (name, "auto") in shown and name != "two even"]
    figure, axes = plt.subplots(2, len(names), figsize=(2.6 * len(names), 5.4), squeeze=False)
    for column, name in zip(axes.T, names, strict=True):
        limits = np.array(shown[name, "auto"]["shown"])
        for axis, guide in zip(column, ("flow", "auto"), strict=True):
            row = shown.get((name, guide))
            if row is not None:
                axis.plot(*np.array(row["shown"]).T, ".", markersize=2.5, alpha=0.4, color="tab:blue")
                axis.set_xlabel(f"{num_found(row)} of {len(row['true'])} modes, ELBO {row['elbo']:.2f}")
            low, high = limits.min(0), limits.max(0)
            margin = 0.05 * (high - low)
            axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
            axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
            axis.set_xticks([])
            axis.set_yticks([])
        column[0].set_title(name)
    axes[0, 0].set_ylabel("AutoRealNVP")
    axes[1, 0].set_ylabel('AutoFlowMixture("auto")')
    figure.tight_layout()
    save(figure, path, results, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--guides", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="the folder of posteriordb, for kidiq")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=results_of("multimodal"))
    parser.add_argument("--report", type=Path, help="print a table of this file and fit nothing")
    parser.add_argument("--figure", type=Path, help="with --report: a picture of the draws")
    options = parser.parse_args()
    if options.report is not None:
        rows = read(options.report)
        report(rows)
        if options.figure is not None:
            plot(rows, options.figure, options.report)
        return
    torch.set_num_threads(options.threads)
    targets = dict(TARGETS)
    if options.data is not None:
        targets["kidiq"] = partial(kidiq, options.data)
    keys = [
        {"target": target, "guide": guide, "seed": seed}
        for seed, target, guide in itertools.product(
            range(options.seeds), options.targets or targets, options.guides or GUIDES
        )
        # Of one mode, and of four components, there is one kind of mixture.
        if not (guide == "four" and target in ("nine", "labels", "sixteen", "ring", "schools", "kidiq"))
    ]
    collect(keys, options.output, partial(fit_one, targets), say)


if __name__ == "__main__":
    main()
