"""compare: several guides of one model in one table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _html
from .._program.call import as_keywords, check_programs
from .._text import aligned
from ._printed import number_text
from ._verdict import VERDICTS
from .diagnosis import Diagnosis, diagnose

__all__ = ["Comparison", "compare"]

HEADER = ("guide", "ELBO ± s.e.", "IW-ELBO", "gap", "ESS", "k-hat", "shift", "verdict")


@dataclass(frozen=True)
class Comparison:
    """Diagnoses of several guides, the best verdict first, then the highest ELBO; prints as a table.

    ELBO, IW-ELBO and gap are in nats, ESS in draws of the number in brackets, the shift in sd.

    :param rows: name and diagnosis of each guide.

    Example::

        >>> found = Diagnosis(-3.2, 0.01, -3.1, 3500.0, 0.2, 4000, "good", (), shift=0.01)
        >>> comparison = Comparison((("AutoPlanar", found),))
        >>> print(comparison)
        guide        ELBO ± s.e.  IW-ELBO   gap          ESS  k-hat  shift  verdict
        AutoPlanar  -3.20 ± 0.01    -3.10  0.10  3500 (4000)   0.20   0.01     good
        >>> comparison[0] is comparison["AutoPlanar"], len(comparison)
        (True, 1)
    """

    rows: tuple[tuple[str, Diagnosis], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, Diagnosis]]:
        return iter(self.rows)

    def __getitem__(self, key: int | str) -> Diagnosis:
        """The diagnosis at a rank, from 0, or of a name."""
        if isinstance(key, str):
            return dict(self.rows)[key]
        return self.rows[key][1]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                f"{d.elbo:.2f} ± {d.elbo_se:.2f}",
                f"{d.iw_elbo:.2f}",
                f"{d.gap:.2f}",
                f"{d.ess:.0f} ({d.num_samples})",
                number_text(d.khat),
                f"{d.shift:.2f}",
                d.verdict,
            )
            for name, d in self.rows
        ]

    def __str__(self) -> str:
        return aligned([HEADER, *self._cells()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook; the reasons appear over the verdict."""
        return _html.table(HEADER, self._cells(), ["\n".join(d.reasons) for _, d in self.rows])


def compare(
    model: Callable[..., Any],
    guides: Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]],
    *args: Any,
    num_samples: int = 4000,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    probes: bool = True,
    of: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Ranks fitted guides of one model by verdict, then by ELBO, with a diagnosis of each.

    Good guides come first, then usable ones, then poor ones: the ELBO alone ranks by the divergence
    KL(q || p), which forgives a guide the modes that it misses.  Models of which one is the other
    reparameterised have the same evidence, so that their ELBOs may be compared too, each from its own call.

    :param model: a Pyro model.
    :param guides: Pyro guides for it, or a mapping from names to guides; otherwise the names are those of the
        classes, with _1, _2 ... where several are of one class.
    :param args: the model's positional arguments.
    :param num_samples: draws of each guide.
    :param kwargs: the model's keyword arguments.
    :param model_kwargs: those whose names are options of this function.
    :param seed: sets Pyro's seed before each guide.
    :param probes: as in :func:`diagnose`.
    :param of: as in :func:`diagnose`.
    :raises ValueError: if ``guides`` is empty or holds something that is no guide.
    :raises TypeError: for a keyword that is neither an option nor an argument of the model.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def narrow():
        ...     pyro.sample("x", dist.Normal(0.0, 0.5))
        >>> [name for name, _ in compare(model, {"narrow": narrow, "exact": model}, seed=0)]
        ['exact', 'narrow']
    """
    named = guides if isinstance(guides, Mapping) else _names(guides)
    if not named:
        raise ValueError("guides: expected at least one guide, got none")
    for name, guide in named.items():
        if not callable(guide):
            raise ValueError(f"guides: expected callables, got {guide!r} as {name!r}")
        check_programs(model, guide)
    kwargs = as_keywords(compare, model, kwargs, model_kwargs)
    rows = [
        (
            name,
            diagnose(
                model,
                guide,
                *args,
                num_samples=num_samples,
                model_kwargs=kwargs,
                seed=seed,
                probes=probes,
                of=of,
            ),
        )
        for name, guide in named.items()
    ]
    return Comparison(tuple(sorted(rows, key=lambda row: (VERDICTS.index(row[1].verdict), -row[1].elbo))))


def _names(guides: Any) -> dict[str, Any]:
    if not isinstance(guides, Sequence) or isinstance(guides, str):
        raise ValueError(f"guides: expected a list of guides or a mapping of names to guides, got {guides!r}")
    named: dict[str, Any] = {}
    for guide in guides:
        name = getattr(guide, "__name__", type(guide).__name__)
        count = sum(1 for other in named if other == name or other.startswith(f"{name}_"))
        named[f"{name}_{count}" if count else name] = guide
    return named
