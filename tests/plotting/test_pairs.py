"""Pairs of scalars: which are shown, and with what draws."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import collections, contour
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_flowvi import AutoPlanar, to_arviz
from pyro_flowvi.datasets import eight_schools_reference
from pyro_flowvi.plotting import pair_panels, plot_pairs


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


Y = torch.tensor([0.5, 1.5])


def names_of(axes):
    return [axis.get_xlabel() for axis in axes[-1]]


def points_of(axis):
    return [c for c in axis.collections if isinstance(c, collections.PathCollection)]


def contours_of(axis):
    return [c for c in axis.collections if isinstance(c, contour.ContourSet)]


class TestWhatIsShown:
    def test_sites_become_scalars(self):
        draws = {"mu": torch.randn(100), "theta": torch.randn(100, 2)}
        axes = plot_pairs(draws, {key: value + 1.0 for key, value in draws.items()})
        assert names_of(axes) == ["mu", "theta[0]", "theta[1]"]
        assert [axis.get_ylabel() for axis in axes[1:, 0]] == ["theta[0]", "theta[1]"]
        assert not any(axis.axison for axis in axes[np.triu_indices(3, 1)])

    def test_chosen_scalars_and_sites(self):
        draws = {"mu": torch.randn(100), "theta": torch.randn(100, 2, 2)}
        assert names_of(plot_pairs(draws, names=["theta[1,0]", "mu"])) == ["theta[1,0]", "mu"]
        assert names_of(plot_pairs(draws, names=["theta[0, 1]"])) == ["theta[0,1]"]
        every = ["theta[1,1]", "theta[0,0]", "theta[0,1]", "theta[1,0]"]
        assert names_of(plot_pairs(draws, names=["theta[1,1]", "theta"])) == every

    @pytest.mark.parametrize("names", [["tau"], ["theta[2]"], ["theta[0,0]"], ["mu[0]"], []])
    def test_unknown_names(self, names):
        draws = {"mu": torch.randn(10), "theta": torch.randn(10, 2)}
        with pytest.raises(ValueError, match="names: expected"):
            plot_pairs(draws, names=names)

    def test_a_name_that_the_reference_has_not(self):
        with pytest.raises(ValueError, match="expected scalars of the reference"):
            plot_pairs({"mu": torch.randn(10)}, {"tau": torch.randn(10)})

    @pytest.mark.parametrize(("size", "note"), [(12, "5 of 12 scalars"), (5, "")])
    def test_what_is_left_out_is_told(self, size, note):
        axes = plot_pairs({"theta": torch.randn(50, size)})
        assert axes.shape == (5, 5)
        (text,) = axes[0, -1].texts
        assert text.get_text() == note
        axes[0, 0].figure.canvas.draw()
        legend, below = axes[0, -1].get_legend().get_window_extent(), text.get_window_extent()
        assert 0 < legend.y0 - below.y1 < below.height or not note

    def test_names_of_columns(self):
        assert names_of(plot_pairs(torch.randn(50, 2), names=["a", "b"])) == ["a", "b"]
        with pytest.raises(ValueError, match="names: expected 2 names, of the columns"):
            plot_pairs(torch.randn(50, 2), names=["a"])
        with pytest.raises(ValueError, match=r"draws: expected .* got shape \(50,\)"):
            plot_pairs(torch.randn(50))


class TestKindsOfDraws:
    @pytest.mark.parametrize("kind", [AutoPlanar, AutoNormal, AutoMultivariateNormal])
    def test_a_guide(self, kind):
        guide = kind(model)
        guide(Y)
        axes = plot_pairs(guide, num_samples=300)
        assert names_of(axes) == ["mu", "theta[0]", "theta[1]"]
        assert len(points_of(axes[1, 0])[0].get_offsets()) == 300

    def test_a_guide_draws_the_sites_that_are_shown(self):
        guide, asked = AutoPlanar(model).materialize(Y), []
        own = guide.sample_posterior

        def sample_posterior(num, **options):
            asked.append((num, options))
            return own(num, **options)

        guide.sample_posterior = sample_posterior
        plot_pairs(guide, names=["mu"], num_samples=70)
        assert asked == [(1, {}), (70, {"sites": ["mu"]})]

    def test_points_are_the_draws(self):
        draws = {"a": torch.randn(40), "b": torch.randn(40)}
        (points,) = points_of(plot_pairs(draws)[1, 0])
        np.testing.assert_allclose(points.get_offsets(), torch.stack([draws["a"], draws["b"]], -1))

    def test_a_guide_before_its_set_up(self):
        with pytest.raises(ValueError, match="draws: expected a fitted guide"):
            plot_pairs(AutoNormal(model))

    def test_a_point_mass(self):
        guide = AutoDelta(model)
        guide(Y)
        plot_pairs(guide, num_samples=20)

    def test_arviz(self):
        pytest.importorskip("arviz")
        data = to_arviz(model, AutoPlanar(model), Y, num_samples=50)
        axes = plot_pairs(data, data.posterior)
        assert names_of(axes) == ["mu", "theta[0]", "theta[1]"]
        np.testing.assert_allclose(
            points_of(axes[1, 0])[0].get_offsets()[:, 0], np.asarray(data.posterior["mu"])[0]
        )

    def test_mcmc_and_a_reference(self):
        kernel = pyro.infer.NUTS(model)
        mcmc = pyro.infer.MCMC(kernel, 20, warmup_steps=5, disable_progbar=True)
        mcmc.run(Y)
        assert names_of(plot_pairs(mcmc)) == ["mu", "theta[0]", "theta[1]"]
        assert names_of(plot_pairs(eight_schools_reference(), names=["tau"])) == ["tau"]

    def test_draws_that_are_not_finite_are_left_out(self):
        value = torch.randn(100)
        value[3] = torch.inf
        axes = plot_pairs({"a": value, "b": torch.randn(100)})
        assert np.isfinite(axes[1, 0].get_xlim()).all()
        with pytest.raises(ValueError, match="draws: expected finite draws of 'a'"):
            plot_pairs({"a": torch.full((5,), torch.nan)})


class TestReference:
    def test_contours_lie_on_top_and_enclose_their_shares(self):
        """Of a standard normal in the plane: circles of the radii sqrt(-2 log(1 - mass))."""
        axes = plot_pairs(torch.randn(2000, 2), torch.randn(200_000, 2))
        (points,), (lines,) = points_of(axes[1, 0]), contours_of(axes[1, 0])
        assert axes[1, 0].collections.index(lines) > axes[1, 0].collections.index(points)
        assert lines.get_zorder() >= points.get_zorder()
        radii = [np.linalg.norm(path.vertices, axis=1).mean() for path in lines.get_paths()]
        np.testing.assert_allclose(radii, [np.sqrt(-2 * np.log(1 - m)) for m in (0.9, 0.5)], rtol=0.03)

    def test_few_are_hollow_points(self):
        over = torch.randn(30, 2)
        _, hollow = points_of(plot_pairs(torch.randn(100, 2), over)[1, 0])
        np.testing.assert_allclose(hollow.get_offsets(), over)
        assert not len(hollow.get_facecolors())

    def test_its_histogram_is_a_line(self):
        axis = plot_pairs(torch.randn(500, 1), torch.randn(500, 1))[0, 0]
        guide, reference = axis.patches
        assert guide.get_fill()
        assert not reference.get_fill()
        assert axis.get_legend_handles_labels()[1] == ["guide", "reference"]


class TestHeavyTails:
    def test_a_positive_scale_has_a_log_axis(self):
        scale = dist.HalfCauchy(1.0).sample((4000,))
        axes = plot_pairs(
            {"scale": scale, "loc": torch.randn(4000)}, {"scale": scale, "loc": torch.randn(4000)}
        )
        assert [axis.get_xscale() for axis in axes[1]] == ["log", "linear"]
        assert axes[0, 0].get_xscale() == "log"
        low, high = axes[0, 0].get_xlim()
        assert 0 < low < np.quantile(scale, 0.01)
        assert high > np.quantile(scale, 0.98)

    @pytest.mark.parametrize("draws", [dist.Exponential(1.0), dist.HalfNormal(1.0), dist.Normal(50.0, 1.0)])
    def test_others_have_not(self, draws):
        axis = plot_pairs({"x": draws.sample((4000,))})[0, 0]
        assert axis.get_xscale() == "linear"

    def test_a_box_ends_where_the_support_does(self):
        assert plot_pairs({"x": dist.HalfNormal(1.0).sample((500,))})[0, 0].get_xlim()[0] == 0.0
        assert plot_pairs({"x": torch.rand(500)})[0, 0].get_xlim() == (0.0, 1.0)

    def test_far_tails_of_both_signs_do_not_rule_the_box(self):
        low, high = plot_pairs({"x": dist.Cauchy(0.0, 1.0).sample((20_000,))})[0, 0].get_xlim()
        assert max(-low, high) < 60

    def test_a_small_mode_is_not_cut_off(self):
        draws = torch.cat([torch.randn(970), torch.randn(30) + 40.0])
        assert plot_pairs({"x": draws})[0, 0].get_xlim()[1] > 41


class TestPanels:
    def test_a_panel_for_each_set(self):
        x, y = np.random.default_rng(0).standard_normal((2, 50))
        axes = pair_panels({"a": (x, y), "b": (y, x)}, ("across", "up"), (x, x), "NUTS")
        assert [axis.get_title() for axis in axes] == ["a", "b"]
        assert [axis.get_xlabel() for axis in axes] == ["across"] * 2
        behind, points = axes[1].collections
        np.testing.assert_allclose(behind.get_offsets(), np.stack([x, x], -1))
        np.testing.assert_allclose(points.get_offsets(), np.stack([y, x], -1))

    def test_no_set(self):
        with pytest.raises(ValueError, match="draws: expected at least one set"):
            pair_panels({}, ("x", "y"))
