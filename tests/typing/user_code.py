"""What users write, read by type checkers alone: a line marked ``# error`` must not pass, all others must."""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_flowvi import (
    FLOWS,
    AutoCIF,
    AutoFlow,
    AutoFlowMixture,
    AutoPlanar,
    AutoRealNVP,
    CompiledSVI,
    FlowVAE,
    VMoNF,
    compare,
    diagnose,
    fit,
    to_arviz,
)
from pyro_flowvi.infer import TraceAnnealed_ELBO, TraceIW_ELBO, TraceSTL_ELBO
from pyro_flowvi.models import FlowMixture, MLPDecoder, MLPEncoder
from pyro_flowvi.transforms import Planar


def model(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)


x, y = torch.arange(3.0), torch.arange(3.0)

# -- guides ------------------------------------------------------------------------------------------

planar = AutoPlanar(model, 8, name="planar", init_scale=0.1, affine="low_rank", tails=True)
realnvp = AutoRealNVP(model, num_layers=4, hidden=(16, 16), affine=None)
AutoFlow(model, "planar_radial")
AutoFlow(model, functools.partial(FLOWS["iaf"], num_layers=2))
AutoFlow(model, lambda dim: Planar(dim))
cif = AutoCIF(model, "planar", num_layers=3, index_dim=2, order="before", num_index_samples=50)
mixture = AutoFlowMixture(model, num_components=3, enumerate="parallel", affine="lower")

AutoPlanar(model, num_layer=3)  # error
AutoPlanar(model, tails=1.5)  # error
AutoPlanar(model, affine="diagonal")  # error
AutoPlanar(model, 8, "planar")  # error
AutoRealNVP(model, hidden=16)  # error
AutoFlow(model, 3)  # error
AutoFlow(model, "planar", init_scale="wide")  # error
AutoCIF(model, order="behind")  # error
AutoCIF(model, num_samples=50)  # error
AutoFlowMixture(model, enumerate="yes")  # error
AutoFlowMixture(model, tail=True)  # error

# -- inference ---------------------------------------------------------------------------------------

result = fit(model, planar, x, y=y, num_steps=100, compile=False, seed=0)
fit(model, planar, x, y, loss=TraceIW_ELBO(8, vectorize_particles=True), compile="auto", lr=1e-2)
fit(model, planar, batches=[(x, y)], validation={"x": x, "y": y}, optim=torch.optim.Adam)
svi = CompiledSVI(model, planar, PyroOptim(torch.optim.Adam, {"lr": 0.01}), TraceSTL_ELBO(), compile=True)
losses: Tensor = svi.run(10, x, y, progress=False)
TraceAnnealed_ELBO(lambda step: 1.0, path=False, num_particles=4)

fit(model, planar, x, y, compile="yes")  # error
fit(model, planar, x, y, num_steps="many")  # error
fit(model, planar, x, y, seed=1.5)  # error
CompiledSVI(model, planar, compile="yes")  # error
CompiledSVI(model, planar, compiled=True)  # error
TraceSTL_ELBO(num_particle=3)  # error
TraceIW_ELBO(dreg="no")  # error
TraceAnnealed_ELBO(0.5)  # error

# -- verdict -----------------------------------------------------------------------------------------

diagnosis = diagnose(model, planar, x, y=y, num_samples=1000, fit_result=result)
verdict: str = diagnosis.verdict
for name, each in compare(model, {"planar": planar, "realnvp": realnvp}, x, y=y, probes=False):
    print(name.upper(), each.khat + 1.0)
to_arviz(model, planar, x, y=y, num_samples=100, resample=True)

diagnose(model, planar, x, y, num_samples="many")  # error
diagnose(model, planar, x, y, probes="yes")  # error
compare(model, 3, x, y)  # error
to_arviz(model, planar, x, y, resample="yes")  # error

# -- models ------------------------------------------------------------------------------------------

vmonf = VMoNF(3, 2, "neural_spline", inference="amortized", weights="fixed", num_layers=2)
vae = FlowVAE(MLPEncoder((1, 8, 8)), MLPDecoder(4, (1, 8, 8)), "planar", num_layers=4, amortize="context")
FlowMixture(3, flow="realnvp", init="kmeans", random_state=0)

VMoNF(3, 2, inference="sampled")  # error
VMoNF(3, 2, weight="uniform")  # error
FlowVAE(MLPEncoder((1, 8, 8)), MLPDecoder(4, (1, 8, 8)), amortize="all")  # error
FlowVAE(MLPEncoder((1, 8, 8)), MLPDecoder(4, (1, 8, 8)), posterior="planar")  # error
FlowMixture(3, flow=5)  # error
