"""Posteriors in files: read without the model, they draw and score as the guide does."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms

from pyro_flowvi import AutoFlow, AutoPlanar, AutoRealNVP, load_posterior
from pyro_flowvi.autoguide import exported
from tests import hierarchies, rows, zoo
from tests.exported_files import FOLDER
from tests.guides import GUIDES, KINDS

KIND_SWEEP = [kind if kind in KINDS else pytest.param(kind, marks=pytest.mark.long) for kind in GUIDES]


def read_back(guide):
    file = io.BytesIO()
    guide.export(file)
    file.seek(0)
    return load_posterior(file)


def moved(guide, size=0.1):
    """Parameters at random, so that no layer is the identity."""
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(size * torch.randn_like(param))
    return guide


def check_like(guide, posterior, num=exported.NUM_DRAWS):
    """The same draws by the same random numbers, and the same densities of other ones."""
    torch.manual_seed(3)
    expected = guide.sample_posterior(num)
    torch.manual_seed(3)
    drawn = posterior.sample_posterior(num)
    assert drawn.keys() == expected.keys()
    for name in drawn:
        assert drawn[name].shape == expected[name].shape
        torch.testing.assert_close(drawn[name], expected[name])
    if not guide.lower_bound:
        other = guide.sample_posterior(num)
        torch.testing.assert_close(posterior.log_prob(other), guide.log_prob(other))


@pytest.mark.parametrize("kind", KIND_SWEEP)
def test_every_guide(kind):
    model, args = zoo.make_zoo()["hierarchy"]
    guide = moved(GUIDES[kind](model).materialize(*args))
    check_like(guide, read_back(guide))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_support(name):
    model, args = zoo.make_zoo()[name]
    guide = moved(AutoRealNVP(model, num_layers=2, hidden=(5,), structure=None).materialize(*args))
    check_like(guide, read_back(guide))


@pytest.mark.parametrize("name", hierarchies.SWEEP)
def test_hierarchies(name):
    model, args = hierarchies.make_hierarchies()[name]
    guide = moved(AutoRealNVP(model, num_layers=2, hidden=(5,)).materialize(*args))
    check_like(guide, read_back(guide))


def two_numbers(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    pyro.sample("y", dist.Normal(mu, tau).expand(y.shape).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "args"), [(two_numbers, ()), (rows.MODELS["normals"][0], (10,))], ids=["flat", "shared by rows"]
)
def test_density_integrates_to_one(model, args):
    """An independent truth: the density of a file, summed over a grid, has the moments of its draws."""
    guide = moved(AutoRealNVP(model, num_layers=2, hidden=(5,)).materialize(rows.data(), *args), 0.05)
    posterior = read_back(guide)
    drawn = posterior.sample_posterior(20_000)
    mu, log_tau = torch.linspace(-6.0, 9.0, 601), torch.linspace(-8.0, 8.0, 601)
    grid = {"mu": mu[:, None].expand(601, 601), "tau": log_tau.exp().expand(601, 601)}
    mass = posterior.log_prob(grid).exp() * grid["tau"] * (mu[1] - mu[0]) * (log_tau[1] - log_tau[0])
    assert float(mass.sum()) == pytest.approx(1.0, abs=2e-3)
    for name, values in (("mu", grid["mu"]), ("tau", log_tau.expand(601, 601))):
        mean = float((mass * values).sum())
        sd = float((mass * (values - mean).square()).sum().sqrt())
        found = drawn[name] if name == "mu" else drawn[name].log()
        assert float(found.mean()) == pytest.approx(mean, abs=5 * sd / 20_000**0.5)
        assert float(found.std()) == pytest.approx(sd, rel=0.05)


def test_shapes_and_sites():
    guide = AutoPlanar(hierarchies.schools, num_layers=2).materialize(torch.randn(6), torch.ones(6))
    posterior = read_back(guide)
    assert posterior.sites == {"mu": (), "tau": (), "theta": (6,)}
    for num, shape in (
        ((), ()),
        (1, (1,)),
        (700, (700,)),
        ((3, 200), (3, 200)),
        (np.int64(2), (2,)),
        (0, (0,)),
    ):
        drawn = posterior.sample_posterior(num)
        assert {name: value.shape for name, value in drawn.items()} == {
            "mu": shape,
            "tau": shape,
            "theta": (*shape, 6),
        }
        if num != 0:
            torch.testing.assert_close(posterior.log_prob(drawn), guide.log_prob(drawn))
        assert posterior.log_prob(drawn).shape == shape
    assert list(posterior.sample_posterior(5, sites=["tau"])) == ["tau"]
    one = {name: value[0] for name, value in posterior.sample_posterior(1).items()}
    many = {**one, "mu": torch.zeros(4, 1)}
    assert posterior.log_prob(many).shape == (4, 1)
    assert float(posterior.log_prob({**one, "tau": torch.tensor(-1.0)})) == -torch.inf
    assert len(set(posterior.sample_posterior(600)["mu"].tolist())) == 600


def test_dtypes():
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        guide = AutoPlanar(hierarchies.schools, num_layers=2).materialize(torch.randn(6), torch.ones(6))
        torch.set_default_dtype(torch.float32)
        posterior = read_back(guide)
        assert posterior.sample_posterior(2)["theta"].dtype == dtype
        assert posterior.log_prob(posterior.sample_posterior(2)).dtype == dtype


@pytest.mark.parametrize("name", ["normals", "two sites", "vectors", "by group"])
def test_latents_that_rows_share(name):
    model, data = rows.MODELS[name]
    guide = moved(AutoRealNVP(model, num_layers=2, hidden=(5,)).materialize(data(), 10))
    posterior = read_back(guide)
    shared = list(posterior.sites)
    torch.manual_seed(3)
    expected = guide.sample_posterior(exported.NUM_DRAWS, sites=shared)
    torch.manual_seed(3)
    drawn = posterior.sample_posterior(exported.NUM_DRAWS)
    for site in shared:
        torch.testing.assert_close(drawn[site], expected[site])
    assert shared
    assert "z" not in shared


def test_in_another_process(tmp_path):
    """A process that imports this package alone, in which the model is not known."""
    guide = moved(AutoRealNVP(hierarchies.schools, num_layers=2).materialize(torch.randn(6), torch.ones(6)))
    path = tmp_path / "posterior.pt"
    guide.export(path)
    drawn = guide.sample_posterior(5)
    torch.save({"drawn": drawn, "log_prob": guide.log_prob(drawn)}, tmp_path / "expected.pt")
    program = """
import torch
import pyro_flowvi
posterior = pyro_flowvi.load_posterior("posterior.pt")
expected = torch.load("expected.pt")
torch.testing.assert_close(posterior.log_prob(expected["drawn"]), expected["log_prob"])
print(posterior.sample_posterior(7)["theta"].shape)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "torch.Size([7, 6])"), done.stderr


def model_of_one():
    pyro.sample("x", dist.Normal(0.0, 1.0))


class Runs:
    """What a malicious pickle holds."""

    def __reduce__(self):
        return (os.mkdir, ("made-by-a-pickle",))


def good_file():
    file = io.BytesIO()
    AutoPlanar(model_of_one, num_layers=1).materialize().export(file)
    return file.getvalue()


def content_of(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def stream_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {**content_of(good_file()), "guide": Runs()}
    for file in (stream_of(content), io.BytesIO(pickle.dumps(Runs(), 4))):
        with pytest.raises(ValueError, match=r"a file that guide.export has written, got a stream"):
            load_posterior(file)
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize(
    "step",
    [
        ("aten.from_file.default", ["secret", False, 4], {}),
        ("aten.from_file.default", ["tanh.bin", False, 4], {}),
        ("os.system", ["touch x"], {}),
        ("aten.nothing.default", [], {}),
        ("builtins.eval.default", ["1"], {}),
        ("prims.device_put.default", [("result", 0), ("device",)], {}),
        ("aten.add.Tensor", [("result", 99), 1], {}),
        ("aten.add.Tensor", [("result", 0), 1], {"alpha): import os #": 1}),
        ("aten.add.Tensor", [("result", -1), 1], {}),
        ("aten.zeros.default", [[2]], {"dtype": ("dtype", "load")}),
        ("aten.__class__.default", [], {}),
    ],
)
def test_a_graph_can_only_compute(step):
    content = content_of(good_file())
    content["graphs"]["draw"]["steps"].append(step)
    with pytest.raises(ValueError, match=r"operation|argument"):
        load_posterior(stream_of(content))


def test_other_files(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError):
        load_posterior(path)
    for data in (b"", b"no zip", good_file()[:-500]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"path: expected a file that .*, got '.*a.pt'"):
            load_posterior(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="of another kind"):
        load_posterior(path)
    torch.save({**content_of(good_file()), "version": 99}, path)
    with pytest.raises(ValueError, match="of version 99 by pyro_flowvi"):
        load_posterior(path)
    torch.save({"format": exported.FORMAT, "version": 1}, path)
    with pytest.raises(ValueError, match="something is missing"):
        load_posterior(path)


def test_bad_values():
    posterior = load_posterior(io.BytesIO(good_file()))
    with pytest.raises(ValueError, match=r"samples: expected the sites \['x'\], got \['z'\]"):
        posterior.log_prob({"z": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"samples\['x'\]: expected shape .* without NaN"):
        posterior.log_prob({"x": torch.tensor([0.0, torch.nan])})
    with pytest.raises(ValueError, match=r"sites: expected some of \['x'\], got \['z'\]"):
        posterior.sample_posterior(2, sites=["z"])


def test_before_data(tmp_path):
    with pytest.raises(RuntimeError, match="has not seen data"):
        AutoPlanar(model_of_one).export(tmp_path / "a.pt")
    guide = AutoPlanar(model_of_one).materialize()
    with pytest.raises(ValueError, match="path: expected a file in a folder that exists"):
        guide.export(tmp_path / "nowhere" / "a.pt")
    assert not list(tmp_path.iterdir())


class Branching(transforms.Transform):
    """What only Python can decide."""

    domain = codomain = dist.constraints.real_vector
    bijective = True

    def _call(self, x):
        return x + 1.0 if bool((x > 0).all()) else x

    def _inverse(self, y):
        return y

    def log_abs_det_jacobian(self, x, y):
        return x.new_zeros(x.shape[:-1])


def test_what_no_graph_holds(tmp_path):
    guide = AutoFlow(model_of_one, lambda dim: Branching()).materialize()
    with pytest.raises(RuntimeError, match="export: sample_posterior cannot be written as"):
        guide.export(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_draw_leaves_the_generator_alone(tmp_path):
    guide = AutoPlanar(model_of_one).materialize()
    state = torch.get_rng_state()
    guide.export(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


VERSIONS = [f"v{version}" for version in range(1, exported.VERSION + 1)]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_files(version):
    assert len(list((FOLDER / version).glob("*.expected.pt"))) >= 7


@pytest.mark.parametrize(
    "path",
    [path for version in VERSIONS for path in sorted((FOLDER / version).glob("*.expected.pt"))],
    ids=lambda path: f"{path.parent.name}-{path.name.partition('.')[0]}",
)
def test_files_of_all_versions(path):
    """What was written once is read, with the densities and, within noise, the moments that it had then."""
    expected = torch.load(path)
    posterior = load_posterior(path.with_name(path.name.replace(".expected", "")))
    num = 20_000
    drawn = posterior.sample_posterior(num)
    for site, (mean, sd) in expected["moments"].items():
        noise = 6 * sd / num**0.5
        assert bool(((drawn[site].mean(0) - mean).abs() <= 2**0.5 * noise + 1e-6).all()), site
        torch.testing.assert_close(drawn[site].std(0), sd, rtol=0.1, atol=1e-6)
    if expected["log_prob"] is not None:
        torch.testing.assert_close(
            posterior.log_prob(expected["some"]), expected["log_prob"], rtol=1e-4, atol=1e-4
        )
