"""What notebooks show of a result: text, tables and lists as HTML, all escaped.

There are no colours, so that dark themes and light ones both fit.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["block", "bullets", "paragraph", "table"]

NUMBER: Final = re.compile(r"\s*([-+−<]?\s*\.?\d|-(?!\w)|nan\b|[-+]?inf\b|\.\.\.?$)", re.IGNORECASE)
"""How a number begins, or what stands in its place; units and errors may follow."""
PADDING: Final = "padding:0.2em 0.8em"


def paragraph(text: str = "", strong: str = "") -> str:
    """A paragraph, which may begin in bold; nothing without text.

    Example::

        >>> paragraph("k < 0.5", strong="good")
        '<p><strong>good</strong> k &lt; 0.5</p>'
    """
    parts = [f"<strong>{html.escape(strong)}</strong>"] if strong else []
    parts += [html.escape(text)] if text else []
    return f"<p>{' '.join(parts)}</p>" if parts else ""


def bullets(lines: Iterable[str]) -> str:
    """A list; nothing without lines.

    Example::

        >>> bullets(["a & b"]), bullets([])
        ('<ul><li>a &amp; b</li></ul>', '')
    """
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], titles: Sequence[str] = ()) -> str:
    """A table; columns of numbers are aligned at the right, all but the first, which has names.

    :param head: of the columns; none for a table without a head.
    :param titles: what appears over the last cell of each row; none for no such texts.

    Example::

        >>> part = table(["x"], [["<"]], titles=["less"])
        >>> part[part.index("<td") :]
        '<td style="text-align:left;padding:0.2em 0.8em" title="less">&lt;</td></tr></tbody></table>'
    """
    lines = [tuple(row) for row in rows]
    width = max(map(len, [head, *lines]))
    numeric = [
        i > 0 and bool(lines) and all(NUMBER.match(row[i]) for row in lines if i < len(row))
        for i in range(width)
    ]
    # A notebook's own style may have neither padding nor an alignment that suits.
    styles = [f"text-align:{'right' if right else 'left'};{PADDING}" for right in numeric]
    columns = "".join(_cell("th", *parts) for parts in zip(styles, head, strict=False))
    body = []
    for i, row in enumerate(lines):
        cells = [_cell("td", *parts) for parts in zip(styles, row, strict=False)]
        if i < len(titles):
            cells[-1] = _cell("td", styles[len(row) - 1], row[-1], titles[i])
        body.append(f"<tr>{''.join(cells)}</tr>")
    top = f"<thead><tr>{columns}</tr></thead>" if columns else ""
    return f"<table>{top}<tbody>{''.join(body)}</tbody></table>"


def _cell(kind: str, style: str, text: str, title: str = "") -> str:
    over = f' title="{html.escape(title, quote=True)}"' if title else ""
    return f'<{kind} style="{style}"{over}>{html.escape(text)}</{kind}>'


def block(*parts: str) -> str:
    """Parts, one under another.

    Example::

        >>> block(paragraph(strong="good"), bullets(["low"]))
        '<div><p><strong>good</strong></p><ul><li>low</li></ul></div>'
    """
    return f"<div>{''.join(parts)}</div>"
