"""One rule for all pictures: where they are drawn, and on what ground."""

import io
import pickle

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from pyro_flowvi.diagnostics import Calibration, Diagnosis
from pyro_flowvi.infer import FitResult
from pyro_flowvi.plotting import (
    pair_panels,
    plot_calibration,
    plot_images,
    plot_khat,
    plot_marginals,
    plot_mixture,
    plot_pairs,
    plot_trace,
)

WEIGHTS = np.random.default_rng(0).standard_normal(400)


def joint(x):
    return -x.square().sum(-1, keepdim=True)


def result():
    losses = torch.linspace(9.0, 1.0, 50)
    return FitResult(None, losses, 1.0, {}, "completed", 0.5, rates=losses / 10, gradient_norms=losses)


def diagnosis():
    return Diagnosis(0.0, 0.0, 0.0, 300.0, 0.3, 400, "good", (), log_weights=WEIGHTS)


PICTURES = {
    "pairs": (lambda ax: plot_pairs({"a": torch.randn(300), "b": torch.randn(300)}, ax=ax), (2, 2)),
    "marginals": (lambda ax: plot_marginals(torch.randn(300, 3), ax=ax), (3,)),
    "panels": (
        lambda ax: pair_panels({"a": (WEIGHTS, WEIGHTS)} | {"b": (WEIGHTS, -WEIGHTS)}, ("x", "y"), ax=ax),
        (2,),
    ),
    "trace": (lambda ax: result().plot(ax=ax), (3,)),
    "khat": (lambda ax: plot_khat(diagnosis(), ax=ax), (2,)),
    "calibration": (
        lambda ax: Calibration({"x": np.arange(60).reshape(20, 3) % 20}, 19, 20).plot(ax=ax),
        (2, 3),
    ),
    "images": (lambda ax: plot_images(torch.rand(4, 8, 8), ax=ax), ()),
    "mixture": (lambda ax: plot_mixture(joint, torch.randn(30, 2), resolution=20, ax=ax), ()),
}
each_picture = pytest.mark.parametrize("name", PICTURES)


def pixels(figure, **options):
    """RGB and opacity of a saved picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50, **options)
    file.seek(0)
    return pyplot.imread(file)


@each_picture
def test_axes_are_returned(name):
    draw, shape = PICTURES[name]
    found = draw(None)
    assert np.shape(found) == shape
    axes = [found] if shape == () else list(found.flat)
    assert all(isinstance(axis, pyplot.Axes) for axis in axes)
    assert {axis.figure.number for axis in axes} == {1}


@each_picture
def test_on_the_callers_axes(name):
    draw, shape = PICTURES[name]
    figure, axes = pyplot.subplots(*(shape if len(shape) == 2 else (1, *(shape or (1,)))), squeeze=False)
    found = draw(axes[0][0] if shape == () else axes)
    assert list(np.ravel(found)) == list(axes.flat)
    assert pyplot.get_fignums() == [figure.number]
    assert all(axis.has_data() or not axis.axison for axis in axes.flat)


@each_picture
def test_in_the_callers_subfigure(name):
    draw, shape = PICTURES[name]
    figure = pyplot.figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    found = draw(right)
    assert np.shape(found) == shape
    assert all(axis.figure is right for axis in np.ravel(found))
    assert not left.axes
    figure.draw_without_rendering()


@each_picture
@pytest.mark.parametrize("ax", [3, "axes", [None]])
def test_what_is_no_axes(name, ax):
    with pytest.raises(ValueError, match="ax: expected"):
        PICTURES[name][0](ax)


def test_another_number_of_axes():
    _, axes = pyplot.subplots(2, 3)
    with pytest.raises(ValueError, match=r"an array of 2 × 2 Axes, .* got 6 Axes"):
        PICTURES["pairs"][0](axes)


def test_the_elbo_alone_on_one_axes():
    _, axis = pyplot.subplots()
    (found,) = plot_trace(result(), ax=axis)
    assert (found, found.get_xlabel(), found.get_ylabel()) == (axis, "step", "ELBO (nats)")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"bbox_inches": "tight", "transparent": True}) for name in PICTURES),
        ("images", {}),
        ("trace", {"bbox_inches": "tight"}),
    ],
)
def test_white_and_opaque_whatever_the_style(name, options):
    with pyplot.style.context("dark_background"), pyplot.rc_context({"savefig.transparent": bool(options)}):
        axis = np.ravel(PICTURES[name][0](None))[0]
        picture = pixels(axis.figure, **options)
    assert (picture[..., 3] == 1.0).all()
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges[:, :3] == 1.0).all()
    # Text and ticks are dark: none is of the style's white.
    axis.figure.canvas.draw()
    labels = [
        axis.xaxis.label,
        axis.yaxis.label,
        axis.title,
        *axis.get_xticklabels(),
        *axis.get_yticklabels(),
    ]
    assert all(np.mean(pyplot.matplotlib.colors.to_rgb(text.get_color())) < 0.3 for text in labels)


def test_the_callers_style_on_the_callers_axes():
    with pyplot.style.context("dark_background"):
        figure, axis = pyplot.subplots()
        plot_images(torch.rand(4, 8, 8), ax=axis)
        assert (pixels(figure)[0, 0, :3] == 0.0).all()


def test_settings_are_left_as_they_were():
    before = dict(pyplot.rcParams)
    PICTURES["pairs"][0](None)
    assert dict(pyplot.rcParams) == before


def test_a_figure_can_be_pickled():
    axes = PICTURES["khat"][0](None)
    assert len(pickle.loads(pickle.dumps(axes[0].figure)).axes) == 2


def test_a_picture_that_fails_leaves_no_figure():
    with pytest.raises(ValueError, match="mixture: expected log densities"):
        plot_mixture(lambda x: x.sum(-1), torch.randn(3, 2))
    assert not pyplot.get_fignums()


def test_calibration_by_function():
    found = Calibration({"x": np.arange(20)}, 19, 20)
    _, axes = pyplot.subplots(2, 1)
    assert plot_calibration(found, ax=axes).shape == (2, 1)
