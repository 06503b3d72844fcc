"""FlowVAE against quadrature, Pyro's own ELBO, and its parts."""

import copy
import importlib
import math
import pickle
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_flowvi import FLOWS, fit
from pyro_flowvi.distributions import FlowDistribution, IndexedFlow
from pyro_flowvi.flows import indexed_layers
from pyro_flowvi.infer import TraceAnnealed_ELBO, TraceIW_ELBO, TraceSTL_ELBO
from pyro_flowvi.models import (
    ConvDecoder,
    ConvEncoder,
    FlowVAE,
    Minibatches,
    MLPDecoder,
    MLPEncoder,
    binarize,
)
from pyro_flowvi.plotting import plot_images
from pyro_flowvi.transforms import IndexedCompose, LULinear, Planar, SplineAutoregressive

SHAPE, DIM, FEATURES = (1, 4, 4), 2, 6


def parts(dim=DIM):
    options = {"activation": "tanh"}
    return MLPEncoder(SHAPE, (8, FEATURES), **options), MLPDecoder(dim, SHAPE, (8,), **options)


def images(num=5):
    return binarize(torch.rand(num, *SHAPE))


def indexed(dim=DIM):
    return indexed_layers("planar", dim, num_layers=2, context_dim=FEATURES)


POSTERIORS = {
    "normal": (lambda: None, {}),
    **{name: (partial(str, name), {"num_layers": 2, "hidden": (4,)}) for name in FLOWS},
    "callable": (lambda: lambda dim: Planar(dim, 3), {}),
    "transform": (lambda: Planar(DIM, 3), {}),
    "conditional": (lambda: FLOWS["realnvp"](DIM, num_layers=2, hidden=(4,), context_dim=FEATURES), {}),
    "list": (lambda: [LULinear(DIM), SplineAutoregressive(DIM, hidden=(4,))], {}),
    "indexed list": (lambda: [LULinear(DIM), *indexed_layers("realnvp", DIM, num_layers=2, hidden=(4,))], {}),
    "indexed compose": (lambda: IndexedCompose(indexed_layers("nice", DIM, num_layers=2, hidden=(4,))), {}),
    "indexed flow": (lambda: IndexedFlow(None, indexed_layers("planar", DIM, num_layers=2)), {}),
    "indexed, extra": (lambda: indexed_layers("planar", DIM, num_layers=2), {"num_extra": 3}),
}
AMORTIZED = [("planar", "context"), ("planar", "hypernetwork"), ("radial", "hypernetwork")]
AMORTIZED += [("neural_spline_ar", "context"), ("realnvp", "hypernetwork"), ("planar_radial", "hypernetwork")]


def build(kind):
    posterior, options = POSTERIORS[kind]
    return FlowVAE(*parts(), posterior(), **options)


def shake(vae, scale=0.3):
    """Away from the start, where all flows are the identity."""
    with torch.no_grad():
        for param in vae.parameters():
            param.add_(scale * torch.randn_like(param))


def all_gradients(vae, loss, x):
    """The largest gradient of each parameter over two steps: of some the first is zero by construction."""
    found = dict.fromkeys(dict(vae.named_parameters()), 0.0)
    optim = torch.optim.SGD(vae.parameters(), 0.05)
    for _ in range(2):
        optim.zero_grad()
        loss.loss_and_grads(vae.model, vae.guide, x)
        for name, param in vae.named_parameters():
            found[name] = max(found[name], 0.0 if param.grad is None else float(param.grad.abs().max()))
        optim.step()
    return found


# -- against an independent truth ------------------------------------------------------------------


def log_evidence(vae, x):
    """log p(x) of a model with one latent, by quadrature on a fine grid."""
    grid = torch.linspace(-9.0, 9.0, 4001)
    with torch.no_grad():
        logits = vae.decoder(grid.unsqueeze(-1))
        log_p = (x.unsqueeze(1) * logits - nn.functional.softplus(logits)).flatten(2).sum(-1)
        log_p = log_p - 0.5 * grid.square() - 0.5 * math.log(2 * math.pi)
    return log_p.logsumexp(-1) + math.log(18.0 / 4000)


@pytest.mark.parametrize(
    "posterior",
    [
        lambda: None,
        lambda: "neural_spline",
        lambda: indexed(1),
        lambda: IndexedFlow(None, indexed_layers("planar", 1, num_layers=2), num_extra=5),
    ],
    ids=["normal", "neural_spline", "indexed", "indexed, extra"],
)
def test_bounds_against_quadrature(posterior):
    vae, x = FlowVAE(*parts(1), posterior()), images(2)
    shake(vae, 0.2)
    with torch.no_grad():
        vae.flow.get_submodule("parts.0.layer").log_scale.fill_(0.5)  # wide: weights have a variance
    truth = log_evidence(vae, x)
    weights = vae.log_weights(x, 10_000)
    elbo, se = weights.mean(0), weights.std(0) / math.sqrt(len(weights))
    assert (elbo <= truth + 4 * se).all()
    assert (elbo < truth - 0.01).any()  # a gap that the weights have to close
    ratios = (weights - truth).exp()
    mean, se = ratios.mean(0), ratios.std(0) / math.sqrt(len(ratios))
    assert ((mean - 1).abs() < 5 * se + 1e-6).all()  # unbiased for p(x)
    grouped = [weights.unflatten(0, (-1, num)).logsumexp(1) - math.log(num) for num in (1, 10, 200)]
    bounds = [group.mean(0) for group in grouped]
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < bounds[2]).all()
    assert ((truth - bounds[2]).abs() < 0.02 + 0.3 * (truth - bounds[0])).all()
    again = vae.log_prob(x.repeat(50, 1, 1, 1), 200).reshape(50, -1)
    error = (again.var(0) / 50 + grouped[2].var(0) / len(grouped[2])).sqrt()
    assert ((again.mean(0) - bounds[2]).abs() < 5 * error).all()


def test_posterior_is_reached():
    """A spline on a one-dimensional latent comes to the evidence, with the model held fixed."""
    vae, x = FlowVAE(*parts(1), "neural_spline", amortize="context", num_layers=2, hidden=(8,)), images(2)
    shake(vae, 0.5)
    vae.decoder.requires_grad_(False)
    before = [param.clone() for param in vae.decoder.parameters()]
    gap = float((log_evidence(vae, x) - vae.elbo(x, 2000)).mean())
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    fit(
        vae.model,
        vae.guide,
        batches=[x],
        validation=x,
        num_steps=150,
        loss=loss,
        lr=2e-2,
        seed=0,
        progress=False,
    )
    assert float((log_evidence(vae, x) - vae.elbo(x, 2000)).mean()) < 0.1 < gap - 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, vae.decoder.parameters(), strict=True))


# -- the Pyro pair ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POSTERIORS)
def test_every_posterior(kind):
    vae, x = build(kind), images()
    vae_start = vae.elbo(x, 2)
    assert vae_start.shape == (5,)
    assert vae_start.isfinite().all()
    gradients = all_gradients(vae, Trace_ELBO(), x)
    assert all(value > 0.0 for value in gradients.values()), gradients
    shake(vae)
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    assert math.isclose(-loss, float(vae.elbo(x).sum()), rel_tol=1e-9)
    q = vae.posterior(x)
    assert (q.batch_shape, q.event_shape) == ((5,), (DIM,))
    assert isinstance(q, IndexedFlow if kind.startswith("indexed") else FlowDistribution)
    assert vae.log_prob(x, 3).shape == (5,)
    assert vae.reconstruct(x, 2).shape == x.shape
    assert vae.sample(3).shape == (3, *SHAPE)


@pytest.mark.parametrize(("flow", "amortize"), AMORTIZED)
def test_amortised_layers_depend_on_the_image(flow, amortize):
    vae, x = FlowVAE(*parts(), flow, num_layers=2, hidden=(4,), amortize=amortize), images(2)
    assert all(value > 0.0 for value in all_gradients(vae, Trace_ELBO(), x).values())
    shake(vae)
    raw = [part.raw_parameters() for part in vae.posterior(x).transform][1:]  # the first is the normal's
    assert raw
    for values in raw:
        assert any((value[0] - value[1]).abs().max() > 1e-3 for value in values.values())


@pytest.mark.parametrize("flow", ["planar", "radial"])
def test_hypernetwork_is_linear_in_the_features(flow):
    vae = FlowVAE(*parts(), flow, num_layers=3, amortize="hypernetwork")
    (layer,) = list(vae.flow.parts)[1:]
    linear = [module for module in layer.network.modules() if isinstance(module, nn.Linear)]
    assert [module.in_features for module in linear] == [FEATURES]
    assert linear[0].out_features == sum(raw.numel() for raw in layer.layer.raw_parameters().values())


@pytest.mark.parametrize("kind", ["normal", "planar", "indexed list", "indexed, extra"])
@pytest.mark.parametrize(
    "loss",
    [
        TraceSTL_ELBO(num_particles=3, vectorize_particles=True),
        TraceAnnealed_ELBO(lambda step: min(1.0, 0.01 + step / 10), num_particles=2),
        TraceIW_ELBO(num_particles=3, vectorize_particles=True),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        RenyiELBO(alpha=0.5, num_particles=2),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_objectives(kind, loss):
    vae, x = build(kind), images()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    before = copy.deepcopy(vae.state_dict())
    assert all(
        math.isfinite(svi.step(x)) for _ in range(2)
    )  # the encoder moves once the normal depends on it
    moved = [name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("encoder") for name in moved)
    assert any(name.startswith("decoder") for name in moved)
    assert any(name.startswith("flow") for name in moved)


def test_closed_form_kl():
    """Against the mean of the likelihood and the closed divergence of two normals."""
    vae, x = FlowVAE(*parts()), images(3)
    shake(vae)
    weights = vae.log_weights(x, 4000)
    (normal,) = list(vae.posterior(x).transform)
    raw = normal.raw_parameters()
    mean, log_scale = raw["loc"], raw["log_scale"]
    z = mean + log_scale.exp() * torch.randn(4000, 3, DIM)
    logits = vae.decode(z)
    log_p = torch.distributions.Bernoulli(logits=logits).log_prob(x).flatten(2).sum(-1)
    kl = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)
    exact = log_p.mean(0) - kl
    error = (weights.var(0) + log_p.var(0)).div(4000).sqrt()
    assert ((weights.mean(0) - exact).abs() < 4 * error).all()
    assert math.isfinite(TraceMeanField_ELBO().loss(vae.model, vae.guide, x))


def test_vectorised_particles_are_the_separate_ones():
    """A convolutional decoder among particles: the mean over many is the same."""
    pyro.set_rng_seed(0)
    vae = FlowVAE(ConvEncoder((1, 8, 8), 4), ConvDecoder(2, (1, 8, 8)), "planar", num_layers=2)
    shake(vae)
    x = binarize(torch.rand(3, 1, 8, 8))
    together = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(vae.model, vae.guide, x)
    weights = vae.log_weights(x, 4000).sum(-1)
    assert abs(-together - float(weights.mean())) < 5 * float(weights.std()) * math.sqrt(2 / 4000)


def test_chunks_do_not_matter(monkeypatch):
    vae, x = build("planar"), images(7)
    shake(vae)
    whole = vae.log_weights(x, 2000)
    monkeypatch.setattr("pyro_flowvi.models.vae.flow_vae._MAX_ELEMENTS", 16 * 100)
    parts = vae.log_weights(x, 2000)
    assert parts.shape == whole.shape == (2000, 7)
    error = (whole.var(0) + parts.var(0)).div(2000).sqrt()
    assert ((whole.mean(0) - parts.mean(0)).abs() < 5 * error).all()


# -- fit --------------------------------------------------------------------------------------------


def fitted(path=None, *, stop=None, kind="indexed list", name="resumed"):
    """A short fit whose data end, or are interrupted, at a step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    encoder, decoder = parts()
    vae = FlowVAE(encoder, decoder, POSTERIORS[kind][0](), name=name)
    batches = Minibatches(torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(0)), 20)

    def supply(step):
        if stop is not None and step >= stop:
            raise KeyboardInterrupt
        return batches(step)

    held_out = binarize(batches.images[:10], 3)
    options = {"num_particles": 1, "lr": 1e-2, "num_steps": 16, "seed": 2, "progress": False}
    result = fit(vae.model, vae.guide, batches=supply, validation=held_out, checkpoint=path, **options)
    return result.stop_reason, result.losses, {key: value.clone() for key, value in vae.state_dict().items()}


def test_resumed_fit_is_identical(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("pyro_flowvi.infer._fit"), "CHECKPOINT_SECONDS", 0.0)
    _, losses, state = fitted()
    assert fitted(tmp_path / "run.pt", stop=9)[0] == "interrupted"
    reason, losses_resumed, state_resumed = fitted(tmp_path / "run.pt")
    assert reason == "completed"
    assert torch.equal(losses, losses_resumed)
    assert all(torch.equal(value, state_resumed[key]) for key, value in state.items())


def test_fit_learns():
    pyro.set_rng_seed(0)
    vae = FlowVAE(*parts(), "planar", num_layers=2, amortize="hypernetwork")
    means = torch.stack([torch.full(SHAPE, 0.05), torch.full(SHAPE, 0.95)]).repeat(50, 1, 1, 1)
    batches = Minibatches(means, 50)
    x = binarize(means)
    before = float(vae.elbo(x, 20).mean())
    held_out = binarize(means[:20], 1)
    options = {"batches": batches, "validation": held_out}
    fit(vae.model, vae.guide, **options, num_steps=80, num_particles=1, lr=3e-2, progress=False)
    best = 16 * (0.05 * math.log(0.05) + 0.95 * math.log(0.95)) - math.log(2)
    assert before < best - 5.0 < float(vae.elbo(x, 20).mean()) - 3.0
    decoded = vae.reconstruct(x, 20).flatten(1).mean(-1)
    assert ((decoded > 0.5) == (means.flatten(1).mean(-1) > 0.5)).all()


# -- state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["planar", "indexed list"])
def test_state(kind):
    vae, x = build(kind), images()
    shake(vae)
    other = build(kind)
    other.load_state_dict(vae.state_dict())
    twins = [other, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))]
    assert len({vae.name, *(twin.name for twin in twins)}) == 4
    pyro.set_rng_seed(1)
    expected = vae.elbo(x)
    for twin in twins:
        pyro.set_rng_seed(1)
        assert torch.equal(twin.elbo(x), expected)
    SVI(twins[1].model, twins[1].guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    pyro.set_rng_seed(1)
    assert torch.equal(vae.elbo(x), expected)


def test_two_models_in_one_store():
    """Neither shares parameters with the other, nor with one that is gone; a loaded store is taken over."""
    x = images()
    vae, other = FlowVAE(*parts()), FlowVAE(*parts())
    for each in (vae, other):
        SVI(each.model, each.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    count = len(dict(vae.named_parameters()))
    store = pyro.get_param_store()
    assert len(store) == 2 * count
    saved, name = store.get_state(), vae.name
    weight = vae.decoder.layers[0].weight.detach().clone()
    del vae, each
    fresh = FlowVAE(*parts(), name=name)
    own = fresh.decoder.layers[0].weight.detach().clone()
    fresh.model(x)
    assert torch.equal(fresh.decoder.layers[0].weight, own)  # what was left over is replaced
    store.set_state(copy.deepcopy(saved))
    fresh.model(x)
    assert torch.equal(fresh.decoder.layers[0].weight, weight)


def test_float32():
    torch.set_default_dtype(torch.float32)
    vae = FlowVAE(*parts(), indexed())
    assert vae.elbo(images()).dtype == torch.float32
    for each in (vae, FlowVAE(*parts())):
        assert each.double().elbo(images().double()).dtype == torch.float64


def test_pictures():
    pytest.importorskip("matplotlib").use("Agg")
    vae = FlowVAE(*parts())
    axis = vae.plot_samples(6, columns=3)
    assert vae.plot_reconstructions(images(4), ax=axis) is axis
    assert [label.get_text() for label in axis.get_yticklabels()] == ["data", "decoded"]
    with pytest.raises(ValueError, match="images: expected shape"):
        plot_images(torch.rand(3, 8))


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((None,), {"encoder": 3}, "encoder: expected a torch module"),
        (("nsf",), {}, "flow: expected one of"),
        ((3,), {}, "flow: expected None"),
        ((nn.Identity(),), {}, "flow: expected"),
        ((lambda dim: Planar(dim + 1),), {"latent_dim": DIM}, "flow: expected transforms of 2"),
        (
            (partial(indexed_layers, "planar", context_dim=3),),
            {},
            "flow: expected layers of context_dim 6",
        ),
        (("planar",), {"amortize": "yes"}, "amortize: expected one of"),
        ((partial(indexed_layers, "planar"),), {"amortize": "context"}, "amortize: expected 'base'"),
        ((Planar,), {"num_layers": 2}, "num_layers: expected None"),
        ((None,), {"hidden": (3,)}, "hidden: expected None"),
        ((None,), {"latent_dim": 0}, "latent_dim: expected a positive integer"),
        ((None,), {"feature_dim": 2.5}, "feature_dim: expected a positive integer"),
        ((None,), {"encoder": nn.Flatten()}, "feature_dim: expected a length"),
        ((None,), {"decoder": nn.Flatten()}, "latent_dim: expected a length"),
        (("planar",), {"num_extra": 2}, "num_extra: expected 0"),
        ((None,), {"name": ""}, "name: expected a non-empty string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, options, match):
    encoder, decoder = parts()
    options = {"encoder": encoder, "decoder": decoder, **options}
    with pytest.raises(ValueError, match=match):
        FlowVAE(options.pop("encoder"), options.pop("decoder"), *arguments, **options)


def test_bad_calls():
    vae = FlowVAE(*parts())
    for x, match in (
        ([1.0], "x: expected a tensor"),
        (torch.ones(3, 16, dtype=torch.long), "x: expected torch.float32 or torch.float64"),
        (torch.ones(16), "x: expected images of shape"),
        (torch.full((3, *SHAPE), 0.5), "x: expected pixels of zeros and ones"),
        (torch.full((3, *SHAPE), math.nan), "x: expected pixels of zeros and ones"),
    ):
        with pytest.raises(ValueError, match=match):
            vae.elbo(x)
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        vae.log_prob(images(), 0)
    with pytest.raises(ValueError, match="decoder: expected logits of shape"):
        FlowVAE(nn.Linear(9, 4), nn.Linear(2, 16)).elbo(torch.ones(3, 9))
    with pytest.raises(ValueError, match="encoder: expected shape"):
        FlowVAE(nn.Linear(9, 4), nn.Linear(2, 9), feature_dim=3).elbo(torch.ones(3, 9))
