"""Mixtures of flows in words: in a line, and what a fit of the estimator has found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import _html
from ..._text import aligned
from ...flows import recipe_name

__all__ = ["MixtureSummary", "flow_text", "mixture_html", "mixture_line"]

MOST_WEIGHTS = 6
"""Weights that a line shows."""


def _facts(mixture: Any) -> dict[str, str]:
    """What there is to say of a :class:`VMoNF`."""
    with torch.no_grad():
        weights = [f"{weight:.2f}" for weight in mixture.mixture().weights.tolist()]
    if len(weights) > MOST_WEIGHTS:
        weights = [*weights[: MOST_WEIGHTS - 2], "...", weights[-1]]
    facts = {"components": str(mixture.num_components), "dim": str(mixture.dim), "flow": mixture.flow_name}
    if mixture.index_dim:
        facts["flow"] += " with a continuous index"
    if mixture.num_classes != mixture.num_components:
        facts["classes"] = str(mixture.num_classes)
    facts["weights"] = f"{mixture.weights_kind} ({', '.join(weights)})"
    facts["inference"] = mixture.inference
    facts["parameters"] = f"{sum(p.numel() for p in mixture.parameters() if p.requires_grad):,}"
    return facts


def mixture_line(mixture: Any) -> str:
    """A :class:`VMoNF` in a line."""
    facts = ", ".join(f"{key}: {text}" for key, text in _facts(mixture).items())
    return f"{type(mixture).__name__}({facts})"


def mixture_html(mixture: Any) -> str:
    """The same for a notebook."""
    rows = list(_facts(mixture).items())
    return _html.block(_html.paragraph(strong=type(mixture).__name__), _html.table((), rows))


@dataclass(frozen=True)
class MixtureSummary:
    """What a fit has found; prints as lines, and in a notebook as tables.

    :param facts: names and texts.
    :param components: of each its label and its weight.
    :param starts: of each that was tried its name, its flow, and its held-out negative log likelihood.

    Example::

        >>> starts = (("kmeans", "realnvp", "2.10"),)
        >>> MixtureSummary((("steps", "60"),), (("0", "0.40"), ("7", "0.60")), starts)
        steps: 60
        component  label  weight
                0      0    0.40
                1      7    0.60
         start     flow  held-out NLL
        kmeans  realnvp          2.10
    """

    facts: tuple[tuple[str, str], ...]
    components: tuple[tuple[str, str], ...]
    starts: tuple[tuple[str, str, str], ...]

    def _tables(self) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
        components = [(str(i), *row) for i, row in enumerate(self.components)]
        return [("component", "label", "weight"), *components], [
            ("start", "flow", "held-out NLL"),
            *self.starts,
        ]

    def __str__(self) -> str:
        lines = [f"{name}: {text}" for name, text in self.facts]
        for rows in self._tables():
            lines.append(aligned(rows, left=0))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        tables = [_html.table(head, rows) for head, *rows in self._tables()]
        return _html.block(_html.table((), self.facts), *tables)

    @classmethod
    def of(cls, mixture: Any) -> "MixtureSummary":
        """That of a :class:`FlowMixture` that was fitted."""
        held_out = f"{mixture.held_out_nll_:.4f}" if mixture.held_out_nll_ < float("inf") else "none held out"
        facts = (
            ("model", type(mixture).__name__),
            ("columns", f"{mixture.n_features_in_}, of which {mixture.varying_.sum()} vary"),
            *_counted(mixture),
            ("flow", flow_text(mixture.flow_)),
            ("start", mixture.start_),
            ("steps", str(mixture.n_iter_)),
            ("converged", "yes" if mixture.converged_ else "no, stopped at values that are not finite"),
            ("held-out NLL, nats a row", held_out),
        )
        components = zip(mixture.component_labels_, mixture.weights_, strict=True)
        return cls(
            facts,
            tuple((str(label), f"{weight:.3f}") for label, weight in components),
            tuple(
                (start["init"], flow_text(start["flow"]), f"{start['held_out_nll']:.4f}")
                for start in mixture.starts_
            ),
        )


def _counted(mixture: Any) -> list[tuple[str, str]]:
    if not mixture.counting_:
        return []
    tried = sorted(mixture.counting_)
    return [("components", f"{mixture.n_components_}, the best of {tried[0]} to {tried[-1]}")]


def flow_text(flow: Any) -> str:
    """The name of a flow, or of what builds it."""
    named = flow if isinstance(flow, str) else recipe_name(flow)
    return named or str(getattr(flow, "__name__", type(flow).__name__))
