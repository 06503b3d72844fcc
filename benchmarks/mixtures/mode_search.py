"""Which modes does the search of a mixture guide find, of normals at random places?

    python -m benchmarks.mixtures.mode_search [--dims 2 5 10 20] [--modes 1 2 4 8 16] [--output m.jsonl]

Mixtures of normals with standard deviations from .5 to 1.2 and weights from .3 to 1.3, up to a constant;
their centres are at random in a box, no two closer than 7.  Nothing is known of the box: there is no prior to
draw from.  A mode is found if a Gaussian of the search is within .5 of it.
"""

import argparse
import itertools
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.common.results import Clock, Row, collect, results_of
from benchmarks.mixtures.targets import free_vector
from pyro_flowvi._compile.log_density import traced
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi.init import find_all_modes

MIXTURES = 6
SIDE, APART = 7.5, 7.0


def places(dim: int, num: int, generator: torch.Generator) -> Tensor:
    """Centres of which no two are close, in a box that grows as long as they do not fit."""
    side, found = SIDE * num ** (1.0 / dim), list[Tensor]()
    while len(found) < num:
        place = side * (2.0 * torch.rand(dim, generator=generator) - 1.0)
        if all(float((place - other).norm()) > APART for other in found):
            found.append(place)
        else:
            side *= 1.02
    return torch.stack(found)


def search(key: Row) -> Row:
    """Looks for the modes of a few mixtures."""
    dim, num, found, exact, clock = key["dim"], key["modes"], 0, 0, Clock()
    for seed in range(MIXTURES):
        generator = torch.Generator().manual_seed(1000 * dim + 10 * num + seed)
        locs = places(dim, num, generator)
        scales = 0.5 + 0.7 * torch.rand(num, 1, generator=generator)
        parts = dist.Normal(locs, scales).to_event(1)
        shares = dist.Categorical(0.3 + torch.rand(num, generator=generator))
        law = dist.MixtureSameFamily(shares, parts, validate_args=False)
        density = UnconstrainedModel(free_vector, (dim, law.log_prob))
        modes = find_all_modes(traced(density), density.start)
        found += int((torch.cdist(locs, modes.gaussian.loc).min(-1).values < 0.5).sum())
        exact += modes.found == num
    return {"found": found, "of": MIXTURES * num, "exact": exact, "mixtures": MIXTURES, **clock.read()}


def say(row: Row) -> str:
    if "error" in row:
        return f"{row['dim']} dimensions, {row['modes']} modes: {row['error']}"
    return f"{row['dim']} dimensions, {row['modes']} modes: {row['found']} of {row['of']} found"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="*", default=[2, 5, 10, 20])
    parser.add_argument("--modes", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--output", type=Path, default=results_of("mode_search"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = [{"dim": dim, "modes": modes} for dim, modes in itertools.product(options.dims, options.modes)]
    collect(keys, options.output, search, say)


if __name__ == "__main__":
    main()
