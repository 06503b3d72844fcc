"""Pictures of mixtures: what is drawn, and files that can be opened."""

import copy
import itertools

import numpy as np
import pytest
import torch

from pyro_flowvi.datasets import NINE_MODES, hide_labels, nine_modes
from pyro_flowvi.distributions import MixtureOfFlows
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.models import FlowMixture
from pyro_flowvi.plotting.mixtures import animate_mixture, plot_mixture
from pyro_flowvi.transforms import Compose, LowerAffine, Stacked

matplotlib = pytest.importorskip("matplotlib")


def two_normals():
    flows = Stacked(Compose([FLOWS["realnvp"](2, num_layers=2), LowerAffine(2)]) for _ in range(2))
    with torch.no_grad():
        flows.each[-1].loc.copy_(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]))
    return MixtureOfFlows(None, flows, torch.tensor([0.25, 0.75]).log())


class TestPlot:
    def test_points_have_the_colour_of_their_component(self):
        x = torch.tensor([[-3.0, 0.0], [-2.0, 1.0], [3.0, 0.5]])
        axis = plot_mixture(two_normals(), x, title="a title")
        (points,) = [c for c in axis.collections if isinstance(c, matplotlib.collections.PathCollection)]
        np.testing.assert_allclose(points.get_offsets(), x)
        colours = points.get_facecolors()
        assert (colours[0] == colours[1]).all()
        assert (colours[0] != colours[2]).any()
        assert axis.get_title() == "a title"

    def test_contours_enclose_their_shares(self):
        """Of a standard normal at the origin: circles of the radii sqrt(-2 log(1 - mass))."""
        x = torch.randn(10, 2)

        def joint(z):
            return -0.5 * z.square().sum(-1, keepdim=True)

        axis = plot_mixture(joint, x, limits=[(-6, 6), (-6, 6)], resolution=300)
        (contours,) = [c for c in axis.collections if isinstance(c, matplotlib.contour.ContourSet)]
        radii = [np.linalg.norm(path.vertices, axis=1).mean() for path in contours.get_paths()]
        np.testing.assert_allclose(radii, [np.sqrt(-2 * np.log(1 - m)) for m in (0.95, 0.5)], rtol=0.02)

    def test_the_ground_is_divided_where_components_are_as_probable(self):
        """Components of unit scale at -3 and 3 with weights 1/4 and 3/4: at x = -log 3 / 6."""
        axis = plot_mixture(two_normals(), torch.randn(5, 2), limits=[(-1, 1), (-1, 1)])
        owner = np.asarray(axis.images[0].get_array())
        assert (owner == owner[0]).all()
        assert np.linspace(-1, 1, 200)[owner[0].argmax()] == pytest.approx(-np.log(3) / 6, abs=0.011)

    def test_labelled_points_and_many_components(self):
        points, labels = nine_modes(20)
        axis = plot_mixture(NINE_MODES.component_log_prob, points, hide_labels(labels, 2))
        drawn = [c for c in axis.collections if isinstance(c, matplotlib.collections.PathCollection)]
        assert [len(c.get_offsets()) for c in drawn] == [180 - 18] + [2] * 9
        owner = np.asarray(axis.images[0].get_array())
        assert set(np.unique(owner)) == set(range(9))

    def test_on_a_given_axis(self):
        figure, axes = matplotlib.pyplot.subplots(1, 2)
        assert plot_mixture(two_normals(), torch.randn(5, 2), ax=axes[1]) is axes[1]
        assert figure.axes == list(axes)
        assert not axes[0].collections

    def test_a_fitted_estimator_in_the_units_of_its_data(self):
        pytest.importorskip("sklearn")
        points, _ = nine_modes(10)
        x = np.asarray(points) * [100.0, 0.01] + [5000.0, -3.0]
        mixture = FlowMixture(3, max_iter=3, n_init=1, init="kmeans", flow="realnvp", random_state=0)
        with pytest.raises(ValueError, match="mixture: expected a fitted FlowMixture"):
            plot_mixture(mixture, x)
        mixture.fit(x)
        axis = plot_mixture(mixture, x, resolution=20, names=("mass", "length"))
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("mass", "length")
        (drawn,) = [c for c in axis.collections if isinstance(c, matplotlib.collections.PathCollection)]
        np.testing.assert_allclose(drawn.get_offsets(), x)
        colours = [tuple(colour) for colour in drawn.get_facecolors()]
        pairs = set(zip(mixture.predict(x), colours, strict=True))
        assert len(pairs) == len(set(mixture.predict(x)))
        across, up = (np.linspace(*box, 20) for box in (axis.get_xlim(), axis.get_ylim()))
        grid = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
        owner = np.asarray(axis.images[0].get_array())
        np.testing.assert_array_equal(owner.ravel(), mixture.predict(grid))

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"mixture": 3}, "mixture"),
            ({"mixture": lambda z: z.sum(-1)}, "mixture"),
            ({"x": torch.zeros(3, 3)}, "x"),
            ({"x": torch.zeros(0, 2)}, "x"),
            ({"labels": torch.zeros(3)}, "labels"),
            ({"labels": [0, 1]}, "labels"),
            ({"limits": [(1, 0), (0, 1)]}, "limits"),
            ({"limits": [(0, 1)]}, "limits"),
            ({"resolution": 0}, "resolution"),
        ],
    )
    def test_bad_arguments_are_named(self, change, name):
        arguments = {"mixture": NINE_MODES.component_log_prob, "x": torch.randn(3, 2), **change}
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            plot_mixture(**arguments)


class TestAnimation:
    def test_a_frame_for_each_snapshot(self, tmp_path):
        image = pytest.importorskip("PIL.Image")
        mixture, snapshots = two_normals(), []
        for step in (0, 10, 20):
            snapshots.append((step, copy.deepcopy(mixture)))
            with torch.no_grad():
                mixture.components.transform.each[-1].loc.mul_(0.5)
        path = animate_mixture(
            snapshots, torch.randn(20, 2), tmp_path / "a.gif", resolution=30, hold=1, limits=[(-4, 4)] * 2
        )
        with image.open(path) as gif:
            assert gif.format == "GIF"
            assert gif.n_frames == 3
            frames = []
            for i in range(3):
                gif.seek(i)
                frames.append(np.asarray(gif.convert("RGB")).copy())
        assert all((a != b).any() for a, b in itertools.pairwise(frames))

    def test_a_generator_may_train_in_between(self, tmp_path):
        seen = []
        loc = torch.zeros(2)

        def joint(z):
            seen.append(loc.clone())
            return -(z - loc).square().sum(-1, keepdim=True)

        def training():
            for step in range(3):
                yield step, joint
                loc.add_(1.0)

        animate_mixture(training(), torch.randn(5, 2), str(tmp_path / "a.gif"), resolution=10)
        assert [place[0].item() for place in seen] == [0, 0, 1, 1, 2, 2]
        assert not matplotlib.pyplot.get_fignums()

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"snapshots": []}, "snapshots"),
            ({"snapshots": [NINE_MODES.component_log_prob]}, "snapshots"),
            ({"snapshots": [(0, NINE_MODES.component_log_prob), (1, 2)]}, "mixture"),
            ({"path": "a.png"}, "path"),
            ({"path": "nowhere/a.gif"}, "path"),
            ({"fps": 0}, "fps"),
            ({"hold": 0}, "hold"),
        ],
    )
    def test_bad_arguments_are_named_and_write_nothing(self, change, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments = {"snapshots": [(0, NINE_MODES.component_log_prob)], "path": "a.gif", **change}
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            animate_mixture(x=torch.randn(3, 2), resolution=10, **arguments)
        assert not list(tmp_path.iterdir())
        assert not matplotlib.pyplot.get_fignums()
