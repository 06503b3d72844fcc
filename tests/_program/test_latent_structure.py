"""Which latents are roots, which are drawn by their priors, and what a guide says of it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size

from pyro_flowvi import AutoCIF, AutoFlow, AutoFlowMixture, AutoPlanar
from pyro_flowvi._program.structure import find_structure
from tests import zoo

NONE = frozenset()


def shapes(**sizes):
    return {name: Size(size) if isinstance(size, tuple) else Size((size,)) for name, size in sizes.items()}


class TestRules:
    def test_a_hierarchy(self):
        found = find_structure(
            shapes(mu=(), tau=(), theta=8), {"mu": NONE, "tau": NONE, "theta": frozenset({"mu", "tau"})}
        )
        assert found.roots == ("mu", "tau")
        assert found.messages == {"theta": {"mu", "tau"}}
        assert found.free == ()
        assert found.hierarchical
        assert str(found) == "roots: mu, tau\ntheta: prior given mu, tau"

    def test_unknown_priors_are_roots_while_they_are_small(self):
        found = find_structure(shapes(simplex=10, field=61, z=3), {"z": frozenset({"field"})})
        assert found.roots == ("simplex",)
        assert found.free == ("field",)
        assert found.messages == {"z": {"field"}}

    @pytest.mark.parametrize(("last", "roots"), [(20, ("a", "b", "c")), (21, ("a", "b"))])
    def test_sixty_numbers_together(self, last, roots):
        found = find_structure(shapes(a=30, b=10, c=last), dict.fromkeys("abc", NONE))
        assert found.roots == roots
        assert set(found.messages) == set("abc") - set(roots)
        assert not found.hierarchical

    def test_a_large_one_leaves_room_for_later_ones(self):
        found = find_structure(shapes(large=300, tau=()), {"large": NONE, "tau": NONE})
        assert found.roots == ("tau",)
        assert found.messages == {"large": NONE}
        assert str(found) == "roots: tau\nlarge: prior of its own"

    def test_no_sites(self):
        assert str(find_structure({}, {})) == "roots: none"

    def test_padded_sites_are_no_roots(self):
        found = find_structure(shapes(a=4, b=4), {"a": NONE}, padded=["a", "b"])
        assert found.roots == ()
        assert found.messages == {"a": NONE}
        assert found.free == ("b",)

    def test_many_names_are_cut(self):
        steps = {f"x_{t}": frozenset({"rate"}) for t in range(9)}
        found = find_structure(shapes(rate=(), **dict.fromkeys(steps, ())), {"rate": NONE, **steps})
        assert str(found).splitlines()[1] == "x_0, x_1, x_2, ..., x_8: prior given rate"

    def test_empty_sites(self):
        found = find_structure(shapes(empty=0, x=()), {"empty": NONE, "x": NONE})
        assert found.roots == ("empty", "x")


def chain(y):
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in range(1, len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y[-1])


def one_dim(y):
    pyro.sample("x", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(0.0, 1.0).expand(y.shape).to_event(1), obs=y)


def crossed(y):
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, tau[..., 0]))
    with pyro.plate("columns", 4, dim=-1):
        b = pyro.sample("b", dist.Normal(0.0, tau[..., 1]))
    with pyro.plate("again", 3, dim=-2), pyro.plate("more", 4, dim=-1):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def padded(y, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", len(y)), pyro.poutine.mask(mask=mask):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def subsampled_group(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand([3]).to_event(1))
    with pyro.plate("data", len(y), subsample_size=4) as index:
        pyro.sample("y", dist.Normal(theta[..., 0], 1.0), obs=y[index])


def branching(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    scale = 1.0 if tau > 1 else 2.0
    with pyro.plate("rows", len(y)):
        pyro.sample("theta", dist.Normal(0.0, scale))


def with_field(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(100)))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(weights[..., :1].squeeze(-1), tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def funnel_of_vectors(y):
    """A prior of unknown kind that depends on others is free, not a root, where there is no room."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("rows", 70):
        pyro.sample("angle", dist.VonMises(0.0, tau))


def printed(model, *args, guide=AutoPlanar, **options):
    return str(guide(model, **options).materialize(*args).structure)


class TestGuides:
    def test_before_data(self):
        assert str(AutoPlanar(zoo.hierarchy).structure) == "flat: the guide has not seen data yet"

    def test_hierarchy(self):
        assert printed(zoo.hierarchy, torch.zeros(4)) == (
            "message map: the priors of latents depend on others\nroots: mu\ntheta: prior given mu"
        )

    @pytest.mark.parametrize("structure", ["auto", "program"])
    def test_chain(self, structure):
        lines = printed(chain, torch.zeros(4), structure=structure).splitlines()
        assert lines[1:] == [
            "roots: x_0",
            "x_1: prior given x_0",
            "x_2: prior given x_1",
            "x_3: prior given x_2",
        ]

    def test_nested_and_crossed(self):
        assert printed(zoo.nested_plates, torch.zeros(2, 3)).splitlines()[1:] == [
            "roots: a",
            "b: prior given a",
        ]
        assert printed(crossed, torch.zeros(3, 4)).splitlines()[1:] == [
            "roots: tau",
            "a, b: prior given tau",
        ]

    def test_structure_none(self):
        assert printed(zoo.hierarchy, torch.zeros(4), structure=None) == "flat: structure=None"

    @pytest.mark.parametrize(
        "name", ["far", "log_normal", "dirichlet", "ordered", "flat", "lkj", "latent_mixture"]
    )
    @pytest.mark.parametrize("structure", ["auto", "program"])
    def test_flat_models(self, name, structure):
        model, args = zoo.make_zoo()[name]
        guide = AutoPlanar(model, structure=structure).materialize(*args)
        assert not guide.structure.taken
        assert str(guide.structure).startswith("flat: no latent has a prior that is known, beside the roots")
        assert guide.structure.found.roots == tuple(guide._unconstrained_shapes)

    def test_one_latent(self):
        assert printed(one_dim, torch.zeros(3)).splitlines()[1:] == ["roots: x"]

    def test_a_large_site_without_parents(self):
        """Nothing depends on anything: only by request."""

        def model():
            pyro.sample("w", dist.Normal(torch.zeros(70), 1.0).to_event(1))

        assert printed(model).splitlines() == [
            "flat: no prior depends on a latent",
            "roots: none",
            "w: prior of its own",
        ]
        guide = AutoPlanar(model, structure="program").materialize()
        assert guide.structure.taken
        assert guide.sample_posterior(3)["w"].shape == (3, 70)

    def test_padded_latents(self):
        mask = torch.tensor([True, False, True, True, False])
        guide = AutoPlanar(padded).materialize(torch.zeros(5), mask)
        assert guide.structure.taken
        assert guide.latent_dim == 4
        assert guide.structure.found.roots == ("mu",)
        assert guide.structure.found.messages == {"theta": {"mu"}}

    def test_all_of_a_site_is_padding(self):
        guide = AutoPlanar(padded).materialize(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
        assert guide.latent_dim == 1
        assert guide.sample_posterior(2)["theta"].shape == (2, 3)

    def test_globals_of_a_subsampled_model(self):
        """Rows are drawn at each run, but no latent is theirs: the priors of the latents are known."""
        guide = AutoPlanar(subsampled_group).materialize(torch.zeros(12))
        assert guide.structure.found.messages == {"theta": {"mu", "tau"}}
        assert guide.structure.taken

    @pytest.mark.parametrize("structure", ["auto", "program"])
    def test_a_model_that_cannot_be_recorded(self, structure):
        guide = AutoPlanar(branching, structure=structure).materialize(torch.zeros(3))
        assert not guide.structure.taken
        assert guide.structure.found is None
        assert str(guide.structure).startswith("flat: the model's priors could not be recorded: ")
        assert guide.sample_posterior(2)["theta"].shape == (2, 3)

    def test_free_sites(self):
        guide = AutoPlanar(with_field).materialize(torch.zeros(4))
        assert str(guide.structure).splitlines() == [
            "message map: the priors of latents depend on others",
            "roots: tau",
            "theta: prior given tau, weights",
            "weights: free",
        ]

    def test_only_roots_and_free_sites(self):
        guide = AutoPlanar(funnel_of_vectors, structure="program").materialize(torch.zeros(3))
        assert not guide.structure.taken
        assert guide.structure.found.free == ("angle",)

    def test_other_guides(self):
        for guide in (AutoCIF, lambda model, **options: AutoFlow(model, "realnvp", **options)):
            assert printed(zoo.hierarchy, torch.zeros(4), guide=guide).startswith("message map")
        with pytest.raises(TypeError):
            AutoFlowMixture(zoo.hierarchy, structure="auto")
        mixture = AutoFlowMixture(zoo.hierarchy, num_components=2).materialize(torch.zeros(4))
        assert mixture.sample_posterior(2)["theta"].shape == (2, 4)

    @pytest.mark.parametrize("structure", ["flat", True, 1, ("auto",)])
    def test_unknown_kinds(self, structure):
        with pytest.raises(ValueError, match="structure: expected 'auto', 'program' or None"):
            AutoPlanar(zoo.hierarchy, structure=structure)

    def test_kinds_are_remembered_for_other_data(self):
        """The structure is that of the set-up that counts."""
        guide = AutoPlanar(zoo.hierarchy).materialize(torch.zeros(4))
        guide(torch.ones(4))
        assert guide.structure.taken
        assert guide.latent_dim == 5
