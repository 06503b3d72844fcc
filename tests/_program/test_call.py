"""Keywords that are the model's, batches in their four forms, programs in the wrong place."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

from pyro_flowvi import AutoPlanar, CompiledSVI, compare, diagnose, fit, to_arviz
from pyro_flowvi._program.call import as_call, as_keywords, keywords_of

Y = torch.tensor([0.5, 1.5, 1.0])


def model(x, y=None, *, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(mu + x, scale), obs=y)


def owner(model, *args, num_steps=None, seed=None, model_kwargs=None, **kwargs):
    return as_keywords(owner, model, kwargs, model_kwargs)


class Module(pyro.nn.PyroModule):
    def forward(self, x, y=None):
        return model(x, y)


@pytest.mark.parametrize("program", [model, poutine.scale(model, 2.0), pyro.infer.config_enumerate(model)])
def test_keywords_of_a_model_and_of_the_handlers_around_it(program):
    assert keywords_of(program) == {"x", "y", "scale"}


def test_keywords_of_modules_and_of_models_that_take_any():
    assert keywords_of(Module()) == {"x", "y"}
    assert keywords_of(lambda *args, **kwargs: None) is None


def test_what_the_function_does_not_own_is_the_model_s():
    assert owner(model, y=1, scale=2.0) == {"y": 1, "scale": 2.0}
    assert owner(model, seed=1, model_kwargs={"seed": 2}) == {"seed": 2}


def test_a_keyword_that_nobody_knows_names_the_nearest():
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=r"num_step: expected an option of owner.*did you mean 'num_steps'"):
            owner(model, num_step=3)
    with pytest.raises(TypeError, match="did you mean 'scale'"):
        owner(model, scal=3)


def test_a_keyword_in_both_places_is_an_error():
    with pytest.raises(ValueError, match="model_kwargs: expected names that are not passed as keywords"):
        owner(model, y=1, model_kwargs={"y": 2})
    with pytest.raises(ValueError, match="model_kwargs: expected a mapping"):
        owner(model, model_kwargs=3)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((1, 2), ((1, 2), {})),
        ([1, 2], ((1, 2), {})),
        (1, ((1,), {})),
        ({"x": 1, "y": 2}, ((), {"x": 1, "y": 2})),
        (((1,), {"y": 2}), ((1,), {"y": 2})),
        ((1, {"y": 2}), ((1, {"y": 2}), {})),  # two arguments, of which one is a dict
        (({"x": 1},), (({"x": 1},), {})),
        ([[1], {"y": 2}], ((1,), {"y": 2})),  # as a DataLoader puts pairs together
    ],
)
def test_four_forms_of_a_batch(batch, expected):
    assert as_call(batch) == expected


LOADERS = {
    "tuples": [(x, y) for x, y in zip(Y, Y, strict=True)],
    "keywords": [{"x": x, "y": y} for x, y in zip(Y, Y, strict=True)],
    "pairs": [((x,), {"y": y}) for x, y in zip(Y, Y, strict=True)],
}


@pytest.mark.parametrize("rows", LOADERS.values(), ids=LOADERS)
def test_batches_of_a_data_loader(rows):
    """The same losses as with the batches by hand."""
    losses = []
    for i, batches in enumerate((DataLoader(rows, 2), [(Y[:2], Y[:2]), (Y[2:], Y[2:])])):
        guide = AutoPlanar(model, 1, name=f"loaded{i}")
        result = fit(model, guide, batches=batches, num_steps=4, lr=0.01, seed=0, progress=False)
        losses.append(result.losses.tolist())
    assert losses[0] == losses[1]


def test_a_dict_for_a_model_of_one_argument():
    def whole(batch):
        model(**batch)

    batch = {"x": Y, "y": Y}
    for given, name in (
        ({"batches": [batch]}, "batches"),
        ({"batches": [(batch,)], "validation": batch}, "valid"),
    ):
        with pytest.raises(TypeError, match=name + r".*\(batch\), got \['x', 'y'\]; .* the batch \(dict,\)"):
            fit(whole, AutoPlanar(whole), **given, num_steps=2, progress=False)
    fit(whole, AutoPlanar(whole), batches=[(batch,)], num_steps=2, progress=False)


FUNCTIONS = {
    "fit": lambda m, g, *a, **k: fit(m, g, *a, num_steps=2, progress=False, **k),
    "diagnose": lambda m, g, *a, **k: diagnose(m, g, *a, num_samples=100, probes=False, **k),
    "compare": lambda m, g, *a, **k: compare(m, [g], *a, num_samples=100, probes=False, **k),
    "to_arviz": lambda m, g, *a, **k: to_arviz(m, g, *a, num_samples=100, **k),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keyword_arguments_as_in_svi_step(name):
    """The same numbers as with positional arguments; a misspelt option is found before anything runs."""
    call, found = FUNCTIONS[name], []
    for args, kwargs in (((Y, Y), {}), ((Y,), {"y": Y}), ((), {"x": Y, "y": Y})):
        pyro.clear_param_store()
        guide = AutoPlanar(model, 2, name=f"planar{len(found)}")
        result = call(model, guide, *args, seed=0, **kwargs)
        found.append(repr(result).replace(f"planar{len(found)}", ""))
        if name == "fit":
            found[-1] = result.losses.tolist()
        if name == "to_arviz":
            found[-1] = result.posterior["mu"].values.tolist()
        del guide
    assert found[0] == found[1] == found[2]
    with pytest.raises(TypeError, match="did you mean"):
        call(model, AutoPlanar(model, 2), Y, y=Y, sed=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_swapped_programs_and_classes_are_refused(name):
    guide = AutoNormal(model)
    with pytest.raises(ValueError, match="swapped"):
        FUNCTIONS[name](guide, model, Y, Y)
    with pytest.raises(ValueError, match="swapped"):
        FUNCTIONS[name](model, lambda x, y=None: model(x, Y), Y, Y)
    with pytest.raises(ValueError, match=r"got the class AutoPlanar; write AutoPlanar\(model\)"):
        FUNCTIONS[name](model, AutoPlanar, Y, Y)


def test_compiled_svi_refuses_swapped_programs():
    with pytest.raises(ValueError, match="swapped"):
        CompiledSVI(AutoNormal(model), model, pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match="swapped"):
        CompiledSVI(model, model, pyro.optim.Adam({"lr": 0.1})).step(Y, Y)


def test_a_guide_may_have_factors():
    def guide(x, y=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 1.0))
        pyro.factor("nothing", torch.zeros(()), has_rsample=True)

    assert diagnose(model, guide, Y, y=Y, num_samples=100, probes=False, seed=0).num_samples == 100
