"""Pictures of mixtures in the plane, and how they came about.  matplotlib is imported when one is drawn."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_positive_int
from ._densities import limits as limits_of
from ._densities import mass_level
from ._panels import COLOURS, import_pyplot, own_figure, panels

__all__ = ["animate_mixture", "plot_mixture"]

Array = NDArray[Any]
Limits = Sequence[tuple[float, float]]
MASSES: Final = (0.5, 0.95)
"""Shares of a component's mass that its contours enclose."""
MARKERS: Final = "osDv^<>Ph*"
"""Of the labels, in order; as often as there are more of them."""


def _joint(mixture: Any) -> Callable[[Tensor], Tensor]:
    """The function that gives log w_k + log p_k, at points in the units of the data."""
    if hasattr(mixture, "_joint_log_prob") and hasattr(mixture, "get_params"):  # a FlowMixture
        if not hasattr(mixture, "model_"):
            raise ValueError(f"mixture: expected a fitted {type(mixture).__name__}, got one before its fit")
        estimator = mixture

        def in_units(x: Tensor) -> Tensor:
            return torch.as_tensor(estimator._joint_log_prob(x.double().cpu().numpy()))

        return in_units
    joint = getattr(mixture, "joint_log_prob", mixture)
    if not callable(joint):
        raise ValueError(f"mixture: expected a joint_log_prob, or a callable, got {type(mixture).__name__}")
    return joint  # type: ignore[no-any-return]


def _rows(x: Any) -> Tensor:
    rows = (
        x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x, float)).to(torch.tensor(0.0))
    )
    if rows.dim() != 2 or rows.shape[1] != 2 or not len(rows):
        raise ValueError(f"x: expected shape (N, 2) with N > 0, got {tuple(rows.shape)}")
    return rows


def _label_array(labels: Any, num: int) -> Array:
    if labels is None:
        return np.full(num, -1)
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.shape != (num,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels: expected {num} integers, got {array.dtype} of shape {array.shape}")
    return array


class _Canvas:
    """What all frames share: the points, the box around them and the grid in it."""

    def __init__(
        self,
        x: Any,
        labels: Any,
        limits: Limits | None,
        resolution: int,
        names: tuple[str, str] = ("x[0]", "x[1]"),
    ) -> None:
        self.names = names
        self.x = _rows(x)
        self.points: Array = self.x.cpu().numpy()
        self.labels = _label_array(labels, len(self.points))
        chosen = [limits_of([column]) for column in self.points.T] if limits is None else [*limits]
        if len(chosen) != 2 or any(len(pair) != 2 or not pair[0] < pair[1] for pair in chosen):
            raise ValueError(f"limits: expected two pairs (low, high), got {limits!r}")
        self.limits = chosen
        number = check_positive_int("resolution", resolution)
        self.axes = [np.linspace(*pair, number) for pair in chosen]
        grid = np.stack(np.meshgrid(*self.axes), -1).reshape(-1, 2)
        self.grid = torch.as_tensor(grid).to(self.x)

    @torch.no_grad()
    def _scores(self, mixture: Any) -> tuple[Array, Array]:
        joint = _joint(mixture)
        pair = [joint(rows) for rows in (self.grid, self.x)]
        for scores, rows in zip(pair, (self.grid, self.x), strict=True):
            if scores.dim() != 2 or len(scores) != len(rows):
                shape = tuple(scores.shape)
                raise ValueError(f"mixture: expected log densities of shape ({len(rows)}, K), got {shape}")
        on_grid, on_points = (scores.double().cpu().numpy() for scores in pair)
        return on_grid.reshape(len(self.axes[1]), len(self.axes[0]), -1), on_points

    def draw(self, ax: Any, mixture: Any, title: str | None) -> None:
        grid, points = self._scores(mixture)
        colours = _colours(grid.shape[-1])
        self._draw_partition(ax, grid.argmax(-1), colours)
        for k, colour in enumerate(colours):
            log_density = grid[..., k]
            density = np.exp(log_density - log_density.max()) if np.isfinite(log_density.max()) else None
            if density is not None and density.min() < density.max():
                levels = sorted({mass_level(density, mass) for mass in MASSES})
                ax.contour(*self.axes, density, levels, colors=[colour], linewidths=1.0)
        self._draw_points(ax, np.array(colours, dtype=object)[points.argmax(-1)])
        ax.set_xlim(*self.limits[0])
        ax.set_ylim(*self.limits[1])
        ax.set_aspect("equal", adjustable="box")
        ax.set_xlabel(self.names[0])
        ax.set_ylabel(self.names[1])
        if title is not None:
            ax.set_title(title)

    def _draw_partition(self, ax: Any, owner: Array, colours: list[str]) -> None:
        from matplotlib.colors import ListedColormap

        extent = [*self.limits[0], *self.limits[1]]
        look = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(colours) - 0.5, "alpha": 0.15}
        ax.imshow(owner, extent=extent, origin="lower", interpolation="nearest", aspect="auto", **look)

    def _draw_points(self, ax: Any, colours: Array) -> None:
        hidden = self.labels == -1
        style: dict[str, Any] = {"rasterized": True, "zorder": 3}
        ax.scatter(*self.points[hidden].T, s=4, linewidths=0, c=list(colours[hidden]), **style)
        for i, label in enumerate(np.unique(self.labels[~hidden])):
            rows = self.labels == label
            style["marker"] = MARKERS[i % len(MARKERS)]
            ax.scatter(
                *self.points[rows].T, s=16, linewidths=0.5, edgecolors="black", c=list(colours[rows]), **style
            )


def _colours(num: int) -> list[str]:
    if num <= len(COLOURS):
        return list(COLOURS[:num])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if num <= 10:
        return [to_hex(colormaps["tab10"](k)) for k in range(num)]
    return [to_hex(colormaps["hsv"](k / num)) for k in range(num)]


def plot_mixture(
    mixture: Any,
    x: Any,
    labels: Any = None,
    *,
    limits: Limits | None = None,
    resolution: int = 200,
    title: str | None = None,
    names: tuple[str, str] = ("x[0]", "x[1]"),
    ax: Any = None,
) -> Any:
    """A mixture in the plane: whose each point is, what each component holds, and how they divide the plane.

    A point has the colour of its most probable component, and so, paler, has the ground.  The contours of a
    component enclose half and 95 % of its mass within the picture.

    :param mixture: a :class:`~pyro_flowvi.distributions.MixtureOfFlows`, a :class:`pyro_flowvi.VMoNF`, a
        fitted :class:`~pyro_flowvi.models.FlowMixture`, in the units of its data, or a callable from
        ``(N, 2)`` to log w_k + log p_k, shape ``(N, K)``.
    :param x: points, shape ``(N, 2)``.
    :param labels: integers, shape ``(N,)``, -1 where there is none: labelled points are larger, with a marker
        for each label.
    :param limits: the picture's box, two pairs (low, high); by default around the points.
    :param resolution: of the grid in each direction.
    :param title: above the picture.
    :param names: of the two columns, for the axes.
    :param ax: the matplotlib Axes to draw on, or a Figure or SubFigure to make one in; None for a new figure.
    :return: the Axes.
    :raises ValueError: if an argument is not of the described kind.
    :raises ImportError: without matplotlib.

    Example::

        >>> locs = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> def joint(x):
        ...     return -2.0 * (x.unsqueeze(-2) - locs).square().sum(-1)
        >>> axis = plot_mixture(joint, torch.randn(100, 2), resolution=50, title="two components")
        >>> axis.get_title(), axis.get_xlabel()
        ('two components', 'x[0]')
    """
    canvas = _Canvas(x, labels, limits, resolution, names)
    _joint(mixture)
    with panels(ax, 1, 1, (4.6, 4.4)) as ((axis,),):
        canvas.draw(axis, mixture, title)
    return axis


def animate_mixture(
    snapshots: Iterable[tuple[int, Any]],
    x: Any,
    path: str | Path,
    labels: Any = None,
    *,
    limits: Limits | None = None,
    resolution: int = 120,
    fps: int = 8,
    hold: int = 8,
) -> Path:
    """Writes a GIF of how a mixture was trained, a frame as :func:`plot_mixture` draws it for each snapshot.

    Each snapshot is drawn before the next is asked for, so ``snapshots`` may be a generator that trains the
    very mixture in between; a list needs copies of it, such as ``copy.deepcopy(vmonf)``.

    After the figures of Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020.

    :param snapshots: pairs of the step and the mixture then, of the kinds that :func:`plot_mixture` takes.
    :param x: as ``labels``, ``limits`` and ``resolution``, that of :func:`plot_mixture`.
    :param path: of the file, ending with ``.gif``.
    :param fps: frames a second.
    :param hold: how many frames the last snapshot stays.
    :return: the path.
    :raises ValueError: if an argument is not of the described kind; no file is written then.
    :raises ImportError: without matplotlib.

    Example::

        >>> import tempfile
        >>> x = torch.cat([torch.randn(50, 2) - 2.0, torch.randn(50, 2) + 2.0])
        >>> vmonf = pyro_flowvi.VMoNF(2, 2, num_layers=2, hidden=(8,))
        >>> elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
        >>> svi = pyro.infer.SVI(vmonf.model, vmonf.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> def training(num_steps, every):
        ...     for step in range(num_steps):
        ...         _ = svi.step(x)
        ...         if step % every == 0:
        ...             yield step, vmonf
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = animate_mixture(training(10, 5), x, directory + "/training.gif", resolution=30)
        ...     path.stat().st_size > 0
        True
    """
    pyplot = import_pyplot()
    from matplotlib.animation import PillowWriter

    target = Path(path)
    if target.suffix.lower() != ".gif":
        raise ValueError(f"path: expected a name that ends with .gif, got {target.name!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path: expected a directory that exists, got {target.parent}")
    canvas = _Canvas(x, labels, limits, resolution)
    repeats = check_positive_int("hold", hold)
    with own_figure(1, 1, (4.6, 4.4)) as ((axis,),):
        try:
            writer = PillowWriter(fps=check_positive_int("fps", fps))
            writer.setup(axis.figure, target, dpi=90)
            drawn = 0
            for item in snapshots:
                if not isinstance(item, tuple) or len(item) != 2:
                    raise ValueError(f"snapshots: expected pairs (step, mixture), got {type(item).__name__}")
                step, mixture = item
                axis.clear()
                canvas.draw(axis, mixture, f"step {step}")
                if not drawn:  # the frames are laid out alike
                    axis.figure.tight_layout()
                writer.grab_frame()
                drawn += 1
            if not drawn:
                raise ValueError("snapshots: expected at least one, got none")
            for _ in range(repeats - 1):
                writer.grab_frame()
            writer.finish()
        finally:
            pyplot.close(axis.figure)
    return target
