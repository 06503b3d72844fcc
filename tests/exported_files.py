"""Files of ``guide.export`` of each version, with what they have to give: ``python -m tests.exported_files``.

It writes those of the present version, for a version that has none yet; files that are there stay for good.
"""

from pathlib import Path

import pyro
import torch

from pyro_flowvi import AutoCIF, AutoFlowMixture, AutoIAF, AutoNeuralSpline, AutoPlanar, AutoRealNVP
from pyro_flowvi.autoguide.exported import VERSION
from tests import hierarchies, rows, zoo

FOLDER = Path(__file__).parent / "autoguide" / "exported"
SIZES = {"num_layers": 2, "hidden": (5,)}


def guides():
    """Name -> a guide of each kind of code, with parameters at random."""
    made = {
        "planar": AutoPlanar(zoo.tiny_scale, num_layers=2, tails=True),
        "iaf": AutoIAF(zoo.dirichlet, **SIZES),
        "spline": AutoNeuralSpline(zoo.lkj, **SIZES),
        "schools": AutoRealNVP(hierarchies.schools, **SIZES),
        "mixture": AutoFlowMixture(zoo.one_dim, num_components=2, **SIZES),
        "cif": AutoCIF(zoo.one_dim, num_layers=2, hidden=(5,), index_dim=1, index_hidden=(4,)),
        "rows": AutoRealNVP(rows.MODELS["normals"][0], **SIZES),
    }
    zoo_args = zoo.make_zoo()
    args = {
        **{
            name: zoo_args[model][1]
            for name, model in (("planar", "tiny_scale"), ("iaf", "dirichlet"), ("spline", "lkj"))
        },
        "schools": hierarchies.make_hierarchies()["schools"][1],
        "rows": (rows.data(), 10),
    }
    for name, guide in made.items():
        guide.materialize(*args.get(name, ()))
        with torch.no_grad():
            for param in guide.parameters():
                param.add_(0.1 * torch.randn_like(param))
    return made


def write(folder):
    """The files of the present version; beside each what it has to give: densities of draws, moments."""
    folder.mkdir()
    for name, guide in guides().items():
        guide.export(folder / f"{name}.pt")
        sites = None if guide._rows is None else guide._rows.first_view().structure.roots
        drawn = guide.sample_posterior(20_000, sites=sites)
        some = {site: value[:20].clone() for site, value in drawn.items()}
        expected = {
            "moments": {site: (value.mean(0), value.std(0)) for site, value in drawn.items()},
            "some": some,
            "log_prob": None if sites or guide.lower_bound else guide.log_prob(some),
        }
        torch.save(expected, folder / f"{name}.expected.pt")


if __name__ == "__main__":
    pyro.set_rng_seed(0)
    write(FOLDER / f"v{VERSION}")
