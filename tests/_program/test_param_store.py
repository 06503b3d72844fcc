"""Names in the param store have one owner, whatever its kind."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_flowvi import AutoFlow, AutoFlowMixture, AutoPlanar, CompiledSVI, diagnose, fit
from pyro_flowvi._program.param_store import adopt_stored, apart_from_store, register, restored
from pyro_flowvi.models import FlowVAE, VMoNF

STOLEN = "a: this {} has lost its name to another of that name \\({}\\)"
Y = torch.tensor([2.0, 3.0, 4.0])


def model(y=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def make_guide(name):
    return AutoPlanar(model, name=name)


def make_mixture(name):
    return VMoNF(2, 2, name=name)


def make_vae(name):
    return FlowVAE(nn.Flatten(), nn.Linear(2, 4), latent_dim=2, feature_dim=4, name=name)


def make_svi(owner, kind=SVI):
    if isinstance(owner, AutoPlanar):
        pair, loss = (model, owner), Trace_ELBO()
    else:
        pair = owner.model, owner.guide
        loss = TraceEnum_ELBO(max_plate_nesting=1) if isinstance(owner, VMoNF) else Trace_ELBO()
    return kind(*pair, pyro.optim.Adam({"lr": 0.1}), loss)


def data_of(owner):
    if isinstance(owner, AutoPlanar):
        return Y.to(torch.get_default_dtype())
    return torch.ones(3, 2) if isinstance(owner, VMoNF) else torch.ones(3, 2, 2)


def values(owner):
    return {key: value.clone() for key, value in owner.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key])


OWNERS = [make_guide, make_mixture, make_vae]


@pytest.mark.parametrize("first", OWNERS)
@pytest.mark.parametrize("second", OWNERS)
@pytest.mark.parametrize("clear", [False, True])
def test_the_later_owner_takes_a_name_over(first, second, clear):
    """What the earlier one wrote is gone, it is not trained any more, and its values are its own."""
    early = first("a")
    svi = make_svi(early)
    svi.step(data_of(early))
    kept = values(early)
    if clear:
        pyro.clear_param_store()
    pyro.param("a.of.the.user", torch.ones(()))
    late = second("a")
    assert late.name == "a"
    assert set(pyro.get_param_store()) == {"a.of.the.user"}
    start = values(late)
    with pytest.raises(RuntimeError, match=STOLEN.format(type(early).__name__, type(late).__name__)):
        svi.step(data_of(early))
    assert_equal(values(late), start)
    make_svi(late).step(data_of(late))
    moved = values(late)
    assert any(not torch.equal(value, moved[key]) for key, value in start.items()) or not start
    with pytest.raises(RuntimeError, match="give them different names"):
        svi.step(data_of(early))
    assert_equal(values(early), kept)
    assert_equal(values(late), moved)
    own = {id(param) for param in late.parameters()}
    assert all(
        id(param) in own for name, param in pyro.get_param_store()._params.items() if ".of." not in name
    )


@pytest.mark.parametrize("make", OWNERS)
def test_a_copy_of_either_has_a_name_of_its_own(make):
    early = make("a")
    make_svi(early).step(data_of(early))
    twin = copy.deepcopy(early)
    assert (early.name, twin.name) == ("a", "a_1")
    make_svi(early).step(data_of(early))  # a copy takes nothing
    late = make("a")
    second = copy.deepcopy(early)
    assert second.name == "a_2"
    assert_equal(values(second), values(early))
    for owner in (twin, second, late):
        make_svi(owner).step(data_of(owner))
    assert not any(
        {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
        for one, other in ((twin, second), (second, late), (late, early))
    )


@pytest.mark.parametrize("make", OWNERS[:2])
def test_an_owner_that_is_gone_leaves_its_name(make):
    early = make("a")
    del early
    assert make("a").name == "a"


def test_default_names_are_counted_while_they_live():
    first, second = make_guide(None), make_guide(None)
    assert (first.name, second.name) == ("AutoPlanar", "AutoPlanar_1")
    third = make_guide("AutoPlanar")
    assert third.name == "AutoPlanar"
    assert make_guide(None).name == "AutoPlanar_2"
    second(Y)
    with pytest.raises(RuntimeError, match="has lost its name"):
        first(Y)


class TestFolds:
    """Guides of earlier folds are kept, and compared."""

    def test_each_fold_is_as_if_it_were_alone(self):
        folds = [Y, -Y, 2 * Y]

        def train(y, name):
            pyro.set_rng_seed(1)
            guide = AutoPlanar(model, name=name)
            fit(model, guide, y, num_steps=20, lr=0.05, progress=False)
            return guide

        guides = [train(y, "a") for y in folds]
        for i, y in enumerate(folds):
            assert_equal(values(guides[i]), values(train(y, f"apart_{i}")))

    def test_what_a_kept_guide_is_good_for(self):
        """Draws, densities, summaries: of its own values, whatever the param store holds now."""
        early = make_guide("a")
        make_svi(early).step(Y)
        late = make_guide("a")
        svi = make_svi(late)
        for _ in range(5):
            svi.step(Y)
        kept = values(early)
        draws = early.sample_posterior(7)
        fresh = AutoPlanar(model).materialize(Y)
        fresh.load_state_dict(kept)
        torch.testing.assert_close(early.log_prob(draws), fresh.log_prob(draws))
        assert_equal(early.median(), fresh.median())
        assert not torch.equal(early.affine.loc, late.affine.loc)
        assert_equal(values(early), kept)
        with pytest.raises(RuntimeError, match=r"copy\.deepcopy of it"):
            diagnose(model, early, Y, num_samples=100, probes=False)
        again = copy.deepcopy(early)
        assert diagnose(model, again, Y, num_samples=100, probes=False).khat is not None
        Predictive(model, guide=again, num_samples=3)()
        assert_equal(values(again), kept)

    def test_pickled_and_read_beside_its_heir(self):
        early = make_guide("a").materialize(Y)
        late = make_guide("a")
        assert pickle.loads(pickle.dumps(early)).name == "a_1"
        late(Y)

    @pytest.mark.parametrize("act", ["call", "fit", "step"])
    def test_nothing_moves_a_guide_that_lost_its_name(self, act):
        early = make_guide("a").materialize(Y)
        late = make_guide("a").materialize(Y)
        before = values(early), values(late)
        with pytest.raises(RuntimeError, match="has lost its name"):
            {
                "call": lambda: early(Y),
                "fit": lambda: fit(model, early, Y, num_steps=3, progress=False),
                "step": lambda: make_svi(early).step(Y),
            }[act]()
        assert_equal(values(early), before[0])
        assert_equal(values(late), before[1])
        assert not pyro.get_param_store()


@pytest.mark.parametrize("make", [make_mixture, make_vae])
def test_a_part_of_a_larger_module_is_shown_once(make):
    """Pyro shows what a PyroModule reads of its parts by their places; a named model does so by its name."""

    class Larger(PyroModule):
        def __init__(self):
            super().__init__()
            self.part = make("inner")

        def forward(self, x):
            self.part.model(x)

    larger = Larger()
    trace = pyro.poutine.trace(larger).get_trace(data_of(larger.part))
    shown = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    assert shown
    assert len(shown) == len(set(map(id, shown)))
    assert all(name.startswith("inner.") for name in pyro.get_param_store())


def test_arguments_are_checked_before_a_name_is_taken():
    early = make_guide("a")
    for bad in (
        lambda: AutoPlanar(model, name="a", init_scale=-1.0),
        lambda: AutoFlow(model, "no such flow", name="a"),
        lambda: AutoFlowMixture(model, 0, name="a"),
        lambda: AutoFlowMixture(model, 2, name="a", init_spread=-1.0),
        lambda: VMoNF(0, 2, name="a"),
    ):
        with pytest.raises(ValueError, match="expected"):
            bad()
    early(Y)


@pytest.mark.parametrize("compile", [pytest.param(True, marks=pytest.mark.long), False])
def test_an_optimizer_that_is_kept(compile):
    """One Adam for both guides: the later has no moments at first, and compiled steps of the other end."""
    optim = pyro.optim.Adam({"lr": 0.1})
    early = make_guide("a")
    first = CompiledSVI(model, early, optim, Trace_ELBO(), compile=compile)
    for _ in range(4):
        first.step(Y)
    assert first.compiled == compile
    late = make_guide("a")
    kept = values(early)
    with pytest.raises(RuntimeError, match="has lost its name"):
        first.step(Y)
    second = SVI(model, late, optim, Trace_ELBO())
    second.step(Y)
    with pytest.raises(RuntimeError, match="has lost its name"):
        first.step(Y)
    assert_equal(values(early), kept)
    for param in late.parameters():
        assert optim.optim_objs[param].state[param]["step"] == 1


class TestStore:
    """What was loaded is not what the earlier guide wrote, and is adopted."""

    @pytest.mark.parametrize("by_file", [False, True])
    @pytest.mark.parametrize("built", ["before", "after"])
    def test_loaded_while_the_earlier_guide_lives(self, tmp_path, by_file, built):
        store = pyro.get_param_store()
        early = make_guide("a")
        make_svi(early).step(Y)
        saved = values(early)
        file, state = tmp_path / "params", store.get_state()
        store.save(file)
        late = make_guide("a") if built == "before" else None
        store.clear()
        store.load(file) if by_file else store.set_state(state)
        late = late or make_guide("a")
        late(Y)
        assert_equal(values(late), saved)
        make_svi(late).step(Y)
        assert not torch.equal(late.affine.loc, early.affine.loc)
        assert_equal(values(early), saved)

    def test_what_others_have_is_left(self):
        """Names that begin alike, and one module in two models."""
        encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)

        def vae(name):
            parts = nn.Sequential(nn.Flatten(), encoder), decoder
            return FlowVAE(*parts, latent_dim=2, feature_dim=4, name=name)

        dotted, first, second = make_guide("a.b"), vae("a"), vae("c")
        dotted(Y)
        for each in (first, second):
            make_svi(each).step(torch.ones(3, 2, 2))
        vae("a")
        store = pyro.get_param_store()
        assert {name.split(".")[0] for name in store} == {"a", "c"}
        assert all(name.startswith("a.b.") for name in store if name.startswith("a"))
        make_svi(second).step(torch.ones(3, 2, 2))
        vae("c")
        assert {name.split(".")[0] for name in store} == {"a"}
        dotted(Y)


def test_in_a_list_of_guides():
    def two(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        model(y)
        pyro.sample("w", dist.Normal(z, 1.0), obs=y.sum())

    def build():
        guides = AutoGuideList(two)
        guides.append(AutoPlanar(pyro.poutine.block(two, expose=["x"]), name="a"))
        guides.append(AutoNormal(pyro.poutine.block(two, expose=["z"])))
        return guides

    early = build()
    SVI(two, early, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(Y)
    late = build()
    svi = SVI(two, late, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(Y)
    before = values(late[0])
    svi.step(Y)
    assert not torch.equal(late[0].affine.loc, before["flow.parts.1.loc"])
    with pytest.raises(RuntimeError, match="has lost its name"):
        early(Y)


def test_with_parameters_of_the_module_alone():
    """Nothing is shared through the store: both may be trained."""
    with pyro.settings.context(module_local_params=True):
        early, late = make_guide("a"), make_guide("a")
        for guide in (early, late, early):
            before = values(guide.materialize(Y))
            make_svi(guide).step(Y)
            assert not torch.equal(before["flow.parts.1.loc"], guide.affine.loc)
        assert not pyro.get_param_store()
    with pytest.raises(RuntimeError, match="has lost its name"):
        early(Y)


@pytest.mark.parametrize("make", [make_guide, make_mixture])
@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_a_string(make, name):
    with pytest.raises(ValueError, match="name: expected a non-empty string"):
        make(name)


def test_what_took_the_place_of_a_leftover_is_one():
    """A guide of another shape and the same default name takes it for no restored value."""
    first, second, third = (
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(3)),
    )
    register("a.x", first)
    adopt_stored("a.x", second)
    assert restored("a") == []
    adopt_stored("a.x", third)
    assert pyro.get_param_store()._params["a.x"] is third


def test_a_leftover_is_one_after_fits_apart():
    """So a guide that is made after sbc starts afresh, whatever earlier guides of its class have left."""
    left, inside = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))
    register("a.x", left)
    with apart_from_store():
        assert not pyro.get_param_store()
        register("a.x", inside)
    assert pyro.get_param_store()._params["a.x"] is left
    assert restored("a") == []
