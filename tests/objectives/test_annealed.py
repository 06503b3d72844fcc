"""The annealed ELBO: its gradient and its schedule."""

import pytest
from pyro.infer import SVI
from pyro.optim import Adam
from torch.distributions import kl_divergence

from pyro_flowvi.objectives.annealed import TraceAnnealed_ELBO
from pyro_flowvi.objectives.path_gradient import TraceSTL_ELBO
from tests.objectives.cases import (
    BETA,
    GUIDES,
    assert_unbiased,
    auto_affine_flow,
    exact_gradient,
    gaussian,
    gradients,
    target,
)


@pytest.mark.parametrize("name", GUIDES)
def test_annealed_is_unbiased(name):
    guide, normal = GUIDES[name](False)
    params = list(guide.parameters())
    elbo = TraceAnnealed_ELBO(lambda step: BETA, num_particles=32, vectorize_particles=True)
    draws = gradients(elbo, gaussian, guide, params)
    q = normal()
    entropy = q.entropy()
    exact = BETA * (kl_divergence(q, target()) + entropy) - entropy
    assert_unbiased(draws, exact_gradient(exact, params))


# -- the schedule ---------------------------------------------------------------------------------------
def test_schedule_is_followed_and_resumed():
    asked = []

    def schedule(step):
        asked.append(step)
        return min(1.0, 0.2 * (step + 1))

    elbo = TraceAnnealed_ELBO(schedule, num_particles=2)
    guide, _ = auto_affine_flow(False)
    svi = SVI(gaussian, guide, Adam({"lr": 0.01}), elbo)
    for step in range(6):
        assert elbo.steps == step
        assert elbo.beta.item() == pytest.approx(min(1.0, 0.2 * (step + 1)))
        svi.evaluate_loss()  # is no step
        svi.step()
    assert asked == list(range(7))
    elbo.steps = 2
    assert elbo.beta.item() == pytest.approx(0.6)
    state = elbo.state_dict()
    svi.step()
    assert {name: value.item() for name, value in state.items()} == {
        "num_dropped": 0,
        "steps": 2,
        "beta": pytest.approx(0.6),
    }
    beta = elbo.beta
    elbo.load_state_dict(state)
    assert (elbo.steps, beta.item()) == (2, pytest.approx(0.6))  # in place
    with pytest.raises(ValueError, match=r"expected \['beta', .*\], got \['num_dropped'\]"):
        elbo.load_state_dict(TraceSTL_ELBO().state_dict())
    ends = TraceAnnealed_ELBO(lambda step: 3.0 - step)
    with pytest.raises(ValueError, match="at step 3"):
        ends.steps = 3
