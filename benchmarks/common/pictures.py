"""Pictures for the documentation: small files on opaque white, which say the results they were drawn from.

So an old picture does not stand by new figures.
"""

import base64
import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

KEY = "Results"
COLOURS = 128
"""Of a palette: more than the eye tells apart in maps of one colour, and a fifth of the file."""


def digest(results: Path) -> str:
    """Of a file of results."""
    return hashlib.sha256(results.read_bytes()).hexdigest()[:16]


def packed(counts: np.ndarray) -> str:
    """Counts of a histogram, below 65,536 each, as short text for a line of results."""
    return base64.b85encode(zlib.compress(counts.astype(np.uint16).tobytes(), 9)).decode()


def unpacked(text: str, bins: int) -> np.ndarray:
    """The counts, shape ``(bins, bins)``."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint16).reshape(bins, bins)


def with_palette(image: Any, colours: int = COLOURS) -> Any:
    """An image of Pillow on white, with few colours."""
    from PIL import Image

    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    # The colours that lie farthest apart, then their means: by how often colours occur, rare dark ones go.
    return page.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


def save(figure: Any, path: Path, results: Path, **options: Any) -> None:
    """A matplotlib figure as PNG with a palette, and with the digest of its results.

    :param options: of ``savefig``.
    """
    from PIL import Image, PngImagePlugin

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    said = PngImagePlugin.PngInfo()
    said.add_text(KEY, digest(results))
    with_palette(Image.open(drawn)).save(path, "PNG", optimize=True, pnginfo=said)
    print(f"wrote {path}")


def drawn_from(path: Path) -> str | None:
    """The digest that a picture has; None for a picture without."""
    data, place = path.read_bytes(), 8
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"tEXt":
            key, _, value = data[place + 8 : place + 8 + length].partition(b"\0")
            if key.decode("latin-1") == KEY:
                return value.decode("latin-1")
        place += 12 + length
    return None
