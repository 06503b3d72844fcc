"""Files in the IDX format."""

import gzip
import struct


def write_idx(path, array, code=8):
    """An array of integers as such a file, gzipped if its name says so; ``code`` is that of the type."""
    data = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(data + array.astype(array.dtype.newbyteorder(">")).tobytes())
