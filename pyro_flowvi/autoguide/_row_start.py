"""Where a guide of rows starts: the roots by full passes over the rows, the messages at their modes."""

import torch
from torch import Tensor

from .._program.log_density import REFUSALS
from ..init.gaussians import normal_noise
from ._message_start import ARRIVED, NODES, REACH, RENEWED_STEPS, Starter, place_messages, renew_messages
from ._pages import Call, View
from ._sweep import Sweep

__all__ = ["place_new_rows", "place_rows"]

ROUNDS = 4
"""Full passes in which the messages are renewed."""
NEWTON_STEPS = 4
"""Newton steps of the roots in each, at most."""
FIRST_STEPS = 12
"""Newton steps of rows from where their priors are."""
FAR = 6.0
"""Standard deviations that a root may move in a step."""
EXACT_ENOUGH = 0.3
"""Standard deviations of a root within which messages that move with the roots need not be renewed."""
MANY_ROWS = 100_000
"""Rows from which one draw of each tells as much as several of fewer."""


class _Paged:
    """The search for the roots over all pages.

    :param sweep: the pages.
    :param width: points of the model at once.
    """

    def __init__(self, sweep: Sweep, width: int) -> None:
        self.sweep, self.width = sweep, width
        self.num = max(1, min(NODES, MANY_ROWS // max(1, sweep.size)))
        self._starters: dict[int, Starter] = {}

    def starter(self, view: object) -> Starter:
        """The search for messages in the pages of a view."""
        known = self._starters.get(id(view))
        if known is None:
            known = self._starters[id(view)] = Starter(view.layer, view.narrow_graph(self.width))  # type: ignore[attr-defined]
        return known

    def renew(self, u: Tensor, sds: Tensor, steps: int) -> bool:
        """Messages of all rows at roots, and how they move with these; False where one has none."""
        ranks = self.sweep.ranks
        return ranks.every(ranks.attempt(lambda: self._renew_own(u, sds, steps), False, REFUSALS))

    def _renew_own(self, u: Tensor, sds: Tensor, steps: int) -> bool:
        tables = self.sweep.tables
        for view, rows, fresh in self.sweep.pages(weighted=False):
            starter = self.starter(view)
            z = starter.follow(u.unsqueeze(0))
            modes, factors = starter.given.newton(z, steps)
            if factors[0] is None:
                return False
            starter.put(modes[0], factors[0], sds)
            tables.store(view.layer, rows, fresh)
        return True

    def locate(self, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, float]:
        """The mode of the roots, a lower factor of their covariance, and how far they moved, in sds.

        By Newton's method on the total over all rows, with differences of its slope.
        """
        if not len(u):
            return u, scale, 0.0
        start = u
        for _ in range(NEWTON_STEPS):
            eye = torch.cat([torch.zeros_like(scale[:1]), scale.mT, -scale.mT])
            slopes = self.sweep.total(u + 0.1 * eye, self.width, seed=11, num=self.num)[1] @ scale
            num = len(u)
            hessian = (slopes[1 + num :] - slopes[1 : 1 + num]) / 0.2
            hessian = 0.5 * (hessian + hessian.mT).nan_to_num(0.0, 0.0, 0.0)
            values, vectors = torch.linalg.eigh(hessian)
            spread = vectors * values.clamp(min=0.05).rsqrt()
            move = spread @ (spread.mT @ slopes[0].nan_to_num(0.0, 0.0, 0.0))
            inside = (spread.mT @ slopes[0]).norm()
            move = move * min(1.0, FAR / max(float(inside), 1e-12))
            u = u + scale @ move
            scale = scale @ torch.linalg.cholesky(spread @ spread.mT)
            if float(inside) < ARRIVED:
                break
        moved = torch.linalg.solve_triangular(scale, (u - start).unsqueeze(-1), upper=False)
        return u, scale, float(moved.abs().max())

    def is_gaussian(self, u: Tensor) -> bool:
        """Whether the latents of rows are what their messages say, as with conjugate priors."""
        ranks = self.sweep.ranks
        return ranks.every(ranks.attempt(lambda: self._own_are_gaussian(u), False, REFUSALS))

    def _own_are_gaussian(self, u: Tensor) -> bool:
        shown = self.sweep.first()
        starter = self.starter(shown.view)
        z = starter.follow(u.unsqueeze(0))[0]
        return starter.is_gaussian(z, normal_noise(NODES, len(z), z, seed=1))


@torch.no_grad()
def place_rows(
    sweep: Sweep, width: int, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """Gives all rows the messages to start with, and says where the roots are.

    :param sweep: the pages.
    :param width: points of the model at once.
    :param known: where the roots may be, and a lower factor of the covariance that they may have.
    :return: location of the roots, ``(R,)``, and lower factor of their covariance; None where the model
        cannot be recorded, or the latents have no modes that can be found.
    """
    tables, ranks = sweep.tables, sweep.ranks
    if not ranks.every(all(view.narrow_graph(width).holds for view in sweep.views())):
        return None
    shown = sweep.first()
    view = shown.view
    near = known is not None and ranks.every(
        ranks.attempt(lambda: _renewed(view, width, *known), False, REFUSALS)
    )
    found = (
        known
        if near
        else ranks.attempt(lambda: place_messages(view.layer, view.narrow_graph(width)), None, REFUSALS)
    )
    if not ranks.every(found is not None):
        return None
    u, scale = ranks.same(found)  # each has looked at its own first page
    tables.store(view.layer, shown.rows, shown.fresh)
    if sweep.num_pages == 1 and sweep.whole and ranks.alone and not near:
        sweep.rows.set_active(sweep.guide, view.layer.shaped)
        return u, scale
    tables.know_nothing_of_others(view.layer, shown.rows)
    paged = _Paged(sweep, width)
    share = 1.0 if near else ranks.same((len(shown.rows) / (sweep.weight * sweep.size)) ** 0.5)
    sds = scale.norm(dim=-1)
    for step in range(ROUNDS):
        if not paged.renew(u, sds, RENEWED_STEPS if step else FIRST_STEPS):
            return None
        u, scale, moved = ranks.same(paged.locate(u, scale if step else share * scale))
        sds = scale.norm(dim=-1)
        if (step or near) and moved < EXACT_ENOUGH:
            break
    if moved > ARRIVED and not paged.renew(u, sds, RENEWED_STEPS):
        return None
    view.layer.shaped = True
    if paged.is_gaussian(u):
        view.layer.leave_shapes_out()
    sweep.rows.set_active(sweep.guide, view.layer.shaped)
    return u, scale


def _renewed(view: View, width: int, loc: Tensor, factor: Tensor) -> bool:
    """Gives a page's map the messages at roots that are known."""
    density = view.density
    assert density is not None
    z = density.start.index_copy(0, view.root_places, loc.to(density.start))
    return renew_messages(Starter(view.layer, view.narrow_graph(width)), z, factor.to(z).norm(dim=-1))


@torch.no_grad()
def place_new_rows(sweep: Sweep, view: View, width: int, rows: Tensor, call: Call, new: Tensor) -> None:
    """Gives rows that no pass has shown the messages to start with, where the roots have started.

    :param view: one that nothing else uses, of as many rows.
    :param width: points of the model at once.
    :param call: the model's arguments.
    :param new: which of the rows, ``(B,)``.
    """
    tables = sweep.tables
    view.page.turn_to(rows, call)
    tables.load(view.layer, rows)
    starter = Starter(view.layer, view.narrow_graph(width))
    u, sds = sweep.guide.draw_roots(64, fixed=True).mean(0), None
    if tables.fixed_shared:  # from there messages move with the roots
        u, sds = tables.fixed_shared["root_loc"], tables.fixed_shared["log_root_width"].exp() / REACH
    modes, factors = starter.given.newton(starter.follow(u.unsqueeze(0)), FIRST_STEPS)
    if factors[0] is not None:
        starter.put(modes[0], factors[0], sds)
        shared = dict(tables.fixed_shared)
        tables.store(view.layer, rows, new)
        tables.fixed_shared = shared
    sweep.seen[rows[new]] = True
