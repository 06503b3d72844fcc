"""Data from files as the arguments of a model."""

import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_flowvi._data_files import load_data
from pyro_flowvi._files import as_floats, stacked_columns


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suffix", ["json", "csv", "tsv", "npz"])
def test_dtypes(suffix):
    """Integers stay integers, other numbers have the default dtype, gaps are NaN."""
    columns = {"k": [1, 2, 3], "x": [1.0, 2.5, 3.0], "b": [True, False, True], "gap": [1, None, 3]}
    path = Path(f"all.{suffix}")
    if suffix == "json":
        path.write_text(json.dumps(columns))
    elif suffix == "npz":
        arrays = {k: np.array(v, dtype=float if k == "gap" else None) for k, v in columns.items()}
        np.savez(path, **{**arrays, "k": arrays["k"].astype(np.uint8)})
    else:
        rows = zip(*columns.values(), strict=True)
        lines = [columns, *(["" if v is None else str(v) for v in row] for row in rows)]
        path.write_text("\n".join({"csv": ",", "tsv": "\t"}[suffix].join(line) for line in lines))
    data = load_data(str(path))
    assert {name: value.dtype for name, value in data.items()} == {
        "k": torch.int64,
        "x": torch.get_default_dtype(),
        "b": torch.bool,
        "gap": torch.get_default_dtype(),
    }
    assert data["k"].tolist() == [1, 2, 3]
    assert data["x"].tolist() == [1.0, 2.5, 3.0]
    assert data["b"].tolist() == [True, False, True]
    assert data["gap"].isnan().tolist() == [False, True, False]
    assert as_floats(data, ["k"])["k"].dtype == torch.get_default_dtype()


def test_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "city": ["a", "b", "c"],
        "y": [1.5, 2.5, 3.5],
        "k": [1, 2, 3],
        "b": [True, False, True],
        "gap": pyarrow.array([1, None, 3]),
        "maybe": pyarrow.array([True, None, False]),
        "price": [Decimal("1.25"), Decimal("2.50"), Decimal("3.75")],
    }
    parquet.write_table(pyarrow.table(columns), "all.parquet", row_group_size=2)
    data = load_data("all.parquet", lambda y, k, b, gap, maybe, price: None)
    assert data.unused == ("city",)
    assert data["y"].tolist() == [1.5, 2.5, 3.5]
    assert (data["k"].tolist(), data["k"].dtype) == ([1, 2, 3], torch.int64)
    assert (data["b"].tolist(), data["b"].dtype) == ([True, False, True], torch.bool)
    assert data["gap"].nan_to_num(-1.0).tolist() == [1.0, -1.0, 3.0]
    assert data["maybe"].nan_to_num(-1.0).tolist() == [1.0, -1.0, 0.0]
    assert data["price"].tolist() == [1.25, 2.5, 3.75]
    assert load_data("all.parquet", lambda x: None, {"x": ["y", "k"]})["x"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"--data: expected numbers in column 'city', got (large_)?string"):
        load_data("all.parquet")
    Path("bad.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"--data: expected a table in 'bad.parquet'"):
        load_data("bad.parquet")
    parquet.write_table(pyarrow.table({"y": pyarrow.array([], "float64")}), "none.parquet")
    with pytest.raises(ValueError, match=r"--data: expected a table, got 'none.parquet' without rows"):
        load_data("none.parquet")


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("all.parquet").write_text("")
    with pytest.raises(ValueError, match=r"--data: expected pyarrow.*pip install 'pyro-flowvi\[parquet\]'"):
        load_data("all.parquet")


def test_a_file_that_cannot_be_read(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    Path("data.csv").write_text("y\n1\n")
    monkeypatch.setattr(Path, "open", refuse)
    message = "--data: expected a file that can be read, got 'data.csv': Permission denied"
    with pytest.raises(ValueError, match=message):
        load_data("data.csv")


def test_columns_make_a_matrix():
    Path("wide.csv").write_text("a,b,text\n1,2.5,u\n3,4.5,v\n")
    columns = stacked_columns(["x=a,b", "one=a,", "y=a"])
    data = load_data("wide.csv", lambda x, one, y: None, columns)
    assert data["x"].tolist() == [[1.0, 2.5], [3.0, 4.5]]
    assert data["one"].tolist() == [[1], [3]]
    assert data["y"].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "expected 2 cells in each row, got 1 in line 3"),
        ("y\n\n1,5\n", "expected 1 cell in each row, got 2 in line 3"),
        ("y\n1\n\nx\n", "expected numbers in column 'y', got 'x' in line 4"),
        ("a,a\n1,2\n", "expected columns of different names"),
        ("a,b\n", "without rows"),
        ("", "without rows"),
    ],
)
def test_bad_tables(text, message):
    Path("bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data("bad.csv")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "--data: expected arrays as numpy.savez writes them, got 'bad.npz'"),
        (np.array(["a", "b"]), "--data: y: expected numbers"),
        (np.array([{}, None], dtype=object), "--data: expected arrays of numbers in 'bad.npz'"),
    ],
)
def test_bad_arrays(array, message):
    if array is None:
        Path("bad.npz").write_text("no")
    else:
        np.savez("bad.npz", y=array)
    with pytest.raises(ValueError, match=message):
        load_data("bad.npz")
