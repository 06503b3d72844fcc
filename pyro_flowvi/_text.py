"""Tables for a prompt."""

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of cells, one under another; the first ``left`` columns begin at the left, the others end alike.

    Example::

        >>> print(aligned([("guide", "ELBO"), ("AutoPlanar", "-3.2")]))
        guide       ELBO
        AutoPlanar  -3.2
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
