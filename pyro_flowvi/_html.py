"""What notebooks show of a result: text, tables and lists as HTML, all escaped.

There are no colours, so that dark themes and light ones both fit.
"""

import html
from collections.abc import Iterable, Sequence

__all__ = ["block", "bullets", "paragraph", "table"]


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
    """A table; numbers are aligned by the notebook's own style.

    :param head: of the columns; none for a table without a head.
    :param titles: what appears over the last cell of each row; none for no such texts.

    Example::

        >>> table(["x"], [["<"]], titles=["less"])
        '<table><thead><tr><th>x</th></tr></thead><tbody><tr><td title="less">&lt;</td></tr></tbody></table>'
    """
    columns = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = []
    for i, row in enumerate(rows):
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row]
        if i < len(titles):
            cells[-1] = f'<td title="{html.escape(titles[i], quote=True)}">{html.escape(row[-1])}</td>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    top = f"<thead><tr>{columns}</tr></thead>" if columns else ""
    return f"<table>{top}<tbody>{''.join(body)}</tbody></table>"


def block(*parts: str) -> str:
    """Parts, one under another.

    Example::

        >>> block(paragraph(strong="good"), bullets(["low"]))
        '<div><p><strong>good</strong></p><ul><li>low</li></ul></div>'
    """
    return f"<div>{''.join(parts)}</div>"
