"""Sections on the cost of a step, of a layer, and of K flows at once."""

from benchmarks.common.results import Row
from benchmarks.common.tables import markdown, number
from benchmarks.layers.peers import OURS, PEERS
from benchmarks.measured.section import Section

INTERVAL = "{:.3g} ({:.3g} to {:.3g})"
CPU = "CPU milliseconds on one core."


def svi_step(rows: list[Row]) -> str:
    columns = ("eager", "step", "run", "update", "scan")
    lines = []
    for row in rows:
        times = [f"{row[name]:.3g}" if name in row else "none" for name in columns]
        ratios = [
            INTERVAL.format(*row[name]) if name in row else "" for name in ("eager / run", "run / scan")
        ]
        lines.append(
            [row["model"], row["guide"], str(row["particles"]), *times, *ratios, f"{row['compile']:.1f}"]
        )
    head = ["model", "guide", "particles", "eager Pyro", "`step`", "`run`", "NumPyro update", "NumPyro scan"]
    return markdown([*head, "eager / `run`", "`run` / scan", "first two calls, wall s"], lines)


SVI_STEP = Section(
    "How long does a step of SVI take?",
    "benchmarks.steps.svi_step",
    f"{CPU} Medians of interleaved rounds, float32, Adam included: Pyro's own `SVI`, `CompiledSVI.step` and "
    "`CompiledSVI.run`, NumPyro's jitted update called in a loop, and its scan of up to 1,000 steps, "
    "jitted once. Ratios are medians of the rounds' ratios with an interval of at least 95 %; below 1 ours "
    "is faster than the scan.",
    svi_step,
    options="--core 1",
)


def transforms(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if not row["eager"]:
            continue
        cells = [row["eager"].get(name, "none") for name in (OURS, *PEERS)]
        times = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells]
        ratio = row["eager_ratio"]
        verdict = "no peer" if ratio is None else "{1:.2f} ({2:.2f} to {3:.2f}), {0}".format(*ratio)
        lines.append([row["flow"], str(row["num_layers"]), row["task"], *times, verdict])
    return markdown(["layer", "K", "task", OURS, *PEERS, "ours / fastest peer"], lines)


TRANSFORMS = Section(
    "How long does a layer take?",
    "benchmarks.layers.transforms",
    f"{CPU} Medians a call, batch 4096 × dimension 32, networks 2 × 64, float32, eager; *train* is forward, "
    "log-determinant and backward. The ratio is ours to the fastest peer, with 95 % of the rounds; below 1 "
    "is faster. normflows inverts a planar layer with a leaky ReLU only, which needs no equation solved.",
    transforms,
    options="--mode eager --layers 1",
)


def mixture_speed(rows: list[Row]) -> str:
    lines = [
        [row["step"], str(row["batch"]), number(row["one_ms"]), number(row["ten_ms"]), number(row["ratio"])]
        for row in rows
    ]
    return markdown(["step", "batch", "K = 1, ms", "K = 10, ms", "ratio"], lines)


MIXTURE_SPEED = Section(
    "What do ten flows cost in one call?",
    "benchmarks.steps.mixture_speed",
    f"{CPU} Steps of maximum likelihood of a mixture of RealNVPs, 8 layers of width 8; *loop* evaluates the "
    "flows one after another.",
    mixture_speed,
)

SECTIONS = (SVI_STEP, TRANSFORMS, MIXTURE_SPEED)
