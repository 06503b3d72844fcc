"""What is read from a trace of a program, against the program as it is written."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import AutoFlowMixture, AutoPlanar
from pyro_flowvi._program.structure import ProgramStructure


def model():
    rate = pyro.param("rate", torch.ones(2, 3))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("rows", 50, subsample_size=7, dim=-2):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("columns", 5, dim=-1):
            pyro.sample("y", dist.Normal(k + rate.sum() + mu.sum(), 1.0), obs=torch.zeros(7, 5))


def small():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for i in pyro.plate("loop", 3):
        pyro.sample(f"y_{i}", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def trace_of(program, guide_trace=None):
    program = program if guide_trace is None else poutine.replay(program, trace=guide_trace)
    return poutine.trace(program).get_trace()


def of_pair(model, guide):
    guide_trace = trace_of(guide)
    return ProgramStructure.of(trace_of(model, guide_trace), guide_trace)


def test_a_model_alone():
    structure = ProgramStructure.of(trace_of(model))
    assert dict(structure.latents) == {"mu": (4,)}
    assert {plate.name: plate.dim for plate in structure.plates} == {"rows": -2, "columns": -1}
    assert structure.max_plate_nesting == 2
    assert structure.subsampled
    assert structure.discrete == structure.enumerated_by_model == {"k"}
    assert structure.enumerated
    assert structure.sums_out
    assert structure.params == {"rate": (2, 3)}
    assert structure.model_params == {"rate"}
    assert structure.largest == 35


def test_a_loop_is_no_dimension():
    structure = ProgramStructure.of(trace_of(small))
    assert [plate.name for plate in structure.plates] == ["loop", "loop", "loop"]
    assert structure.max_plate_nesting == 0
    assert not any([structure.subsampled, structure.enumerated, structure.sequential, structure.params])


def test_a_model_with_its_guide():
    guide = AutoNormal(poutine.block(model, expose=["mu"]))
    structure = of_pair(model, guide)
    assert set(structure.latents) == {"mu"}
    assert structure.model_params == {"rate"}
    assert set(structure.params) == {"rate", "AutoNormal.locs.mu", "AutoNormal.scales.mu"}
    assert structure.path_gradients
    assert structure.auxiliary == {"mu_unconstrained"}


def test_a_packed_latent_is_auxiliary():
    guide = AutoPlanar(small).materialize()
    structure = of_pair(small, guide)
    assert structure.auxiliary == {f"_{guide.name}_latent"}
    assert dict(structure.latents) == {"x": (3,)}


def test_a_component_may_be_drawn():
    guide = AutoFlowMixture(small, 2).materialize()
    structure = of_pair(small, guide)
    assert structure.enumerated_by_guide == structure.marginal == {f"_{guide.name}_component"}
    assert structure.enumerated
    assert not any([structure.summed_by_guide, structure.sums_out])


@pytest.mark.parametrize("where", ["parallel", "sequential"])
def test_a_site_that_the_guide_sums_out(where):
    def pair():
        pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": where})

    structure = of_pair(pair, pair)
    assert structure.enumerated_by_guide == {"z"}
    assert structure.summed_by_guide
    assert structure.sums_out
    assert structure.sequential == ({"z"} if where == "sequential" else set())
    assert not structure.path_gradients
