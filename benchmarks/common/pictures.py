"""Pictures for the documentation: small files on opaque white."""

import io
from pathlib import Path
from typing import Any

COLOURS = 128
"""Of a palette: more than the eye tells apart in maps of one colour, and a fifth of the file."""


def with_palette(image: Any, colours: int = COLOURS) -> Any:
    """An image of Pillow on white, with few colours."""
    from PIL import Image

    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    # The colours that lie farthest apart, then their means: by how often colours occur, rare dark ones go.
    return page.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


def save(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure as a PNG with a palette."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with_palette(Image.open(drawn)).save(path, "PNG", optimize=True)
