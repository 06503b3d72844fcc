"""Missed modes that are mirror images: which are called so, by which names, and where nothing is said."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median
from torch.distributions import constraints

from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi.diagnostics import diagnose
from pyro_flowvi.diagnostics._symmetries import find_symmetry, in_words, share_in_words
from pyro_flowvi.diagnostics._symmetry_moves import Elements, families


def clusters(count):
    """Rows of 1-D data around ``count`` places, the same at every call."""
    grid = torch.linspace(-1.4, 1.4, 15)
    widths = torch.linspace(0.6, 1.2, count).unsqueeze(-1)
    return (4.5 * torch.arange(count).unsqueeze(-1) + widths * grid).reshape(-1)


def mixture(count):
    y = clusters(count)

    def model():
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((count,), 2.0)))
        with pyro.plate("components", count):
            locs = pyro.sample("locs", dist.Normal(3.0, 5.0))
            scales = pyro.sample("scales", dist.LogNormal(0.0, 0.3))
        terms = weights.log().unsqueeze(-2) + dist.Normal(locs.unsqueeze(-2), scales.unsqueeze(-2)).log_prob(
            y.unsqueeze(-1)
        )
        pyro.factor("y", terms.logsumexp(-1).sum(-1))

    return model


def mixture_of_sites(prior_of_second=5.0):
    y = clusters(2)

    def model():
        mu1 = pyro.sample("mu1", dist.Normal(2.0, 5.0))
        mu2 = pyro.sample("mu2", dist.Normal(2.0, prior_of_second))
        sigma1 = pyro.sample("sigma1", dist.LogNormal(0.0, 0.3))
        sigma2 = pyro.sample("sigma2", dist.LogNormal(0.0, 0.3))
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        first = w.log().unsqueeze(-1) + dist.Normal(mu1.unsqueeze(-1), sigma1.unsqueeze(-1)).log_prob(y)
        second = (-w).log1p().unsqueeze(-1) + dist.Normal(mu2.unsqueeze(-1), sigma2.unsqueeze(-1)).log_prob(y)
        pyro.factor("y", torch.logaddexp(first, second).sum(-1))

    return model


def three_sites():
    y = clusters(3).unsqueeze(-1)
    locs = torch.stack([pyro.sample(f"loc_{c}", dist.Normal(4.0, 5.0)) for c in "abc"], -1)
    scales = torch.stack([pyro.sample(f"scale_{c}", dist.LogNormal(0.0, 0.3)) for c in "abc"], -1)
    terms = dist.Normal(locs.unsqueeze(-2), scales.unsqueeze(-2)).log_prob(y)
    pyro.factor("y", terms.logsumexp(-1).sum(-1))


def breakpoints():
    """Two steps at times that may come in any order."""
    t = torch.linspace(0.0, 1.0, 40)
    y = 1.0 + 2.0 * (t > 0.3) - 3.0 * (t > 0.7) + 0.2 * torch.cos(40.0 * t)
    level = pyro.sample("level", dist.Normal(0.0, 3.0)).unsqueeze(-1)
    times = [pyro.sample(name, dist.Uniform(0.0, 1.0)).unsqueeze(-1) for name in ("first", "second")]
    steps = [pyro.sample(f"step_{name}", dist.Normal(0.0, 3.0)).unsqueeze(-1) for name in ("first", "second")]
    mean = level + sum(
        step * torch.sigmoid(20.0 * (t - time)) for step, time in zip(steps, times, strict=True)
    )
    pyro.factor("y", dist.Normal(mean, 0.4).log_prob(y).sum(-1))


def one_factor():
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    scores = pyro.sample("scores", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    y = torch.tensor([1.0, -1.5, 0.5, 2.0]).unsqueeze(-1) * torch.tensor([3.0, -2.0, 2.5])
    mean = scores.unsqueeze(-1) * loadings.unsqueeze(-2)
    pyro.factor("y", dist.Normal(mean, 0.5).log_prob(y).sum((-1, -2)))


def two_factors():
    """Rotations are no symmetry: the prior of the loadings is no normal."""
    loadings = pyro.sample("loadings", dist.Laplace(torch.zeros(3, 2), 1.0).to_event(2))
    scores = pyro.sample("scores", dist.Normal(torch.zeros(5, 2), 1.0).to_event(2))
    y = torch.cos(torch.arange(15.0)).reshape(5, 3)
    mean = scores @ loadings.transpose(-1, -2)
    pyro.factor("y", dist.Normal(mean, 0.5).log_prob(y).sum((-1, -2)))


def two_modes(weight, width=1.0):
    def model():
        modes = dist.Normal(torch.tensor([-6.0, 6.0]), torch.tensor([width, 1.0]))
        pyro.sample(
            "x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([weight, 1.0 - weight])), modes)
        )
        pyro.sample("z", dist.Normal(0.0, 1.0))

    return model


def upper_mode():
    pyro.sample("x", dist.Normal(6.0, 0.95))
    pyro.sample("z", dist.Normal(0.0, 1.0))


def gaussian_at(model, **start):
    """The Gaussian at one mode of the model, by its Hessian."""
    values = {name: torch.as_tensor(value) for name, value in start.items()}
    density = UnconstrainedModel(
        model,
        init_loc_fn=lambda site: values[site["name"]] if site["name"] in values else init_to_median(site),
    )
    z = density.start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -density.log_density(z)
        loss.backward()
        return loss

    optimizer.step(closure)
    hessian = torch.autograd.functional.hessian(lambda z: -density.log_density(z), z.detach())
    tril = torch.linalg.cholesky(torch.linalg.inv(hessian))
    guide = AutoMultivariateNormal(model)
    guide()
    with torch.no_grad():
        guide.loc.copy_(z)
        guide.scale = tril.diagonal().clone()
        guide.scale_tril = tril / tril.diagonal().unsqueeze(-1)
    return guide


def verdict(model, guide):
    return diagnose(model, guide, seed=0, num_samples=400)


def told(found):
    return [reason for reason in found.reasons if "mirror image" in reason]


class TestVerdict:
    def test_labels_of_a_plate(self):
        model = mixture(2)
        found = verdict(model, gaussian_at(model, locs=[0.0, 4.5]))
        assert told(found) == [
            "this mode has half of the mass; its mirror image under swapping the elements of weights, locs "
            "and scales is missing"
        ]
        assert found.verdict == "poor"
        assert found.probes.missed == pytest.approx(0.5, abs=0.01)
        (remedy,) = (advice for advice in found.advice if "OrderedTransform" in advice)
        assert "AutoFlowMixture, which holds several modes" in remedy

    def test_labels_of_separate_sites(self):
        model = mixture_of_sites()
        found = verdict(model, gaussian_at(model, mu1=0.0, mu2=4.5))
        assert told(found) == [
            "this mode has half of the mass; its mirror image under swapping mu1 and mu2, sigma1 and sigma2, "
            "w and 1 - w is missing"
        ]

    @pytest.mark.long
    def test_three_labels(self):
        model = mixture(3)
        found = verdict(model, gaussian_at(model, locs=[0.0, 4.5, 9.0]))
        assert told(found) == [
            "this mode has a sixth of the mass; its mirror images under permuting the elements of weights, "
            "locs and scales are missing"
        ]

    def test_breakpoints(self):
        start = {"first": 0.3, "second": 0.7, "step_first": 2.0, "step_second": -3.0, "level": 1.0}
        found = verdict(breakpoints, gaussian_at(breakpoints, **start))
        assert told(found) == [
            "this mode has half of the mass; its mirror image under swapping first and second, step_first "
            "and step_second is missing"
        ]

    def test_signs_of_a_factor(self):
        guide = gaussian_at(one_factor, loadings=[3.0, -2.0, 2.5], scores=[1.0, -1.5, 0.5, 2.0])
        found = verdict(one_factor, guide)
        assert "its mirror image under changing the signs of loadings and scores" in told(found)[0]
        assert any("positive support" in advice for advice in found.advice)

    def test_of_one_of_two_equal_modes(self):
        found = verdict(two_modes(0.5), upper_mode)
        assert told(found) == [
            "this mode has half of the mass; its mirror image under changing the sign of x is missing"
        ]

    @pytest.mark.parametrize("model", [two_modes(0.4), two_modes(0.5, 1.1)])
    def test_unequal_modes(self, model):
        found = verdict(model, upper_mode)
        assert found.probes.missed > 0.3
        assert not told(found)
        assert any("a missed mode" in reason for reason in found.reasons)

    def test_a_guide_with_both(self):
        model = two_modes(0.5)
        found = diagnose(model, model, seed=0)
        assert found.verdict == "good"
        assert found.probes.symmetry is None
        assert not told(found)


def found_for(model, draws, *images, weights=None):
    """Of sites' values, and of functions that make those of each region from them."""
    density = UnconstrainedModel(model)
    pack = density.packing.unconstrain
    regions = [pack(image(draws))[0].to(density.start) for image in images]
    masses = weights or [0.1] * len(images)
    z = pack(draws)[0].to(density.start)
    return find_symmetry(density.value_and_grad, density.packing, z, regions, masses)


def around(size=300, **values):
    return {name: torch.as_tensor(v) * (1 + 0.02 * torch.randn(size, 1)) for name, v in values.items()}


class TestSearch:
    """By draws and regions that are made by hand."""

    def draws_of_mixture(self, count):
        draws = around(locs=4.5 * torch.arange(count) + 0.5, scales=torch.ones(count))
        draws["scales"] = draws["scales"] * (0.2 * torch.randn(300, count)).exp()
        draws["weights"] = (0.2 * torch.randn(300, count)).softmax(-1)
        return draws

    def test_one_image_tells_of_all(self):
        """A cycle and an exchange of two: from either, all six are known."""
        draws = self.draws_of_mixture(3)
        for order in ([1, 2, 0], [1, 0, 2]):
            found = found_for(
                mixture(3), draws, lambda d, order=order: {k: v[:, order] for k, v in d.items()}
            )
            assert found.images == 6
            assert found.missed(0.1) == pytest.approx(5 / 6)

    def test_three_sites(self):
        locs = {f"loc_{c}": 4.5 * i + 0.5 for i, c in enumerate("abc")}
        draws = {name: v + 0.1 * torch.randn(300) for name, v in locs.items()}
        draws |= {f"scale_{c}": (0.2 * torch.randn(300)).exp() for c in "abc"}

        def cycle(d):
            return {
                f"{stem}_{a}": d[f"{stem}_{b}"] for stem in ("loc", "scale") for a, b in ("ab", "bc", "ca")
            }

        found = found_for(three_sites, draws, cycle)
        assert found.images == 6
        assert found.under == "permuting loc_a, loc_b and loc_c together with scale_a, scale_b and scale_c"

    def test_signs_of_columns(self):
        draws = {
            "loadings": torch.tensor([[2.0, 1.0], [-1.0, 2.0], [1.0, -2.5]]) + 0.05 * torch.randn(300, 3, 2),
            "scores": torch.sin(torch.arange(10.0)).reshape(5, 2) + 0.05 * torch.randn(300, 5, 2),
        }
        second = torch.tensor([1.0, -1.0])
        found = found_for(two_factors, draws, lambda d: {k: v * second for k, v in d.items()})
        assert found.under == "changing the signs of columns of loadings and scores"
        assert (found.exchanges, found.signs, found.images) == (False, True, 4)
        both = found_for(two_factors, draws, lambda d: {k: (v * second).flip(-1) for k, v in d.items()})
        assert both.exchanges
        assert both.explained == 1.0

    @pytest.mark.parametrize("prior", [5.001, 5.1])
    def test_what_is_nearly_a_symmetry_is_none(self, prior):
        if prior < 5.01 and torch.get_default_dtype() == torch.float32:
            pytest.skip("less than what float32 resolves")
        draws = {
            "mu1": 0.1 * torch.randn(300),
            "mu2": 4.5 + 0.1 * torch.randn(300),
            "sigma1": (0.1 * torch.randn(300)).exp(),
            "sigma2": (0.1 * torch.randn(300)).exp(),
            "w": torch.sigmoid(0.3 * torch.randn(300)),
        }

        def swapped(d):
            pairs = {"mu1": "mu2", "mu2": "mu1", "sigma1": "sigma2", "sigma2": "sigma1"}
            return {**{a: d[b] for a, b in pairs.items()}, "w": 1.0 - d["w"]}

        assert found_for(mixture_of_sites(), draws, swapped).images == 2
        assert found_for(mixture_of_sites(prior), draws, swapped) is None

    def test_a_region_that_no_symmetry_explains(self):
        draws = self.draws_of_mixture(2)

        def elsewhere(d):
            return {**d, "locs": d["locs"] + 50.0}

        def flipped(d):
            return {k: v.flip(-1) for k, v in d.items()}

        assert found_for(mixture(2), draws, elsewhere) is None
        assert found_for(mixture(2), draws, flipped, weights=[0.0]) is None
        found = found_for(mixture(2), draws, flipped, elsewhere, weights=[0.3, 0.1])
        assert found.explained == pytest.approx(0.75)
        assert found.missed(0.4) == pytest.approx(1 - 0.9 / 2)

    def test_sites_with_symmetries_of_their_own_are_left_out(self):
        def model():
            a, b = (pyro.sample(name, dist.Normal(0.0, 3.0)) for name in "ab")
            for i in range(12):
                pyro.sample(f"noise_{i}", dist.Normal(0.0, 1.0))
            pyro.factor("y", dist.Normal(a * b, 0.5).log_prob(torch.tensor(6.0)))

        draws = {"a": 2.0 + 0.1 * torch.randn(300), "b": 3.0 + 0.1 * torch.randn(300)}
        draws |= {f"noise_{i}": torch.randn(300) for i in range(12)}
        found = found_for(model, draws, lambda d: {**d, "a": -d["a"], "b": -d["b"]})
        assert found.under == "changing the signs of a and b"
        assert found.images == 2

    def test_labels_of_rows_and_columns(self):
        """A Markov chain: states are exchanged in rows and columns of the transitions."""

        def model():
            with pyro.plate("states", 2):
                transition = pyro.sample("transition", dist.Dirichlet(torch.full((2,), 2.0)))
                locs = pyro.sample("locs", dist.Normal(0.0, 4.0))
            start = pyro.sample("start", dist.Dirichlet(torch.ones(2)))
            alpha = start
            for y in (1.0, 1.2, -2.0, -2.2, -1.9, 1.1, 0.8):
                alpha = ((alpha.unsqueeze(-2) @ transition).squeeze(-2)) * dist.Normal(locs, 1.0).log_prob(
                    torch.tensor(y)
                ).exp()
            pyro.factor("y", alpha.sum(-1).log())

        draws = {
            "transition": (torch.tensor([[1.0, 0.0], [-1.0, 1.0]]) + 0.2 * torch.randn(300, 2, 2)).softmax(
                -1
            ),
            "locs": torch.tensor([-2.0, 1.0]) + 0.1 * torch.randn(300, 2),
            "start": (0.3 * torch.randn(300, 2)).softmax(-1),
        }

        def exchanged(d):
            return {**{k: v.flip(-1) for k, v in d.items()}, "transition": d["transition"].flip(-1, -2)}

        found = found_for(model, draws, exchanged)
        assert found.images == 2
        assert found.under.startswith("swapping the ")
        for site in ("rows of transition", "columns of transition", "start", "locs"):
            assert site in found.under


def test_elements_and_back():
    def model():
        with pyro.plate("k", 2):
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("o", dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(True))
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("none", dist.Normal(torch.zeros(2, 0), 1.0).to_event(2))

    density = UnconstrainedModel(model)
    elements = Elements(density.packing)
    z = torch.randn(20, density.dim)
    assert elements.size == 6 + 3 + 1
    assert set(families(elements)) == {1, 2, 3}
    torch.testing.assert_close(elements.back(elements.of(z)).to(z), z)
    p = elements.of(z)[:, :6].exp().reshape(20, 2, 3)
    assert constraints.simplex.check(p).all()


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.5, "half"),
        (1 / 3, "a third"),
        (1 / 6, "a sixth"),
        (1 / 24, "4.2 %"),
        (1 / 120, "less than 1 %"),
        (0.45, "45 %"),
    ],
)
def test_shares(share, words):
    assert share_in_words(share) == words


def test_words():
    rows = ("w", 0, 2)
    exchange = [("axis", ("locs", 0, 1), 3, (0, 2)), ("axis", rows, 3, (0, 2))]
    assert in_words(exchange, False) == "swapping locs[0] and locs[2], w[0,:] and w[2,:]"
    assert in_words(exchange, True) == "permuting the elements of locs, the rows of w"
    assert in_words([("reflect", "t")], False) == "reflecting t in its interval"
