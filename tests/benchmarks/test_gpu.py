"""The parts of the GPU benchmark run, in small sizes on the CPU."""

import json

import pytest
import torch

from benchmarks.gpu import run


@pytest.mark.long
@pytest.mark.parametrize("part", ["regression", "rows", "vae"])
def test_part_in_small_sizes(part, tmp_path):
    torch.set_default_dtype(torch.float32)
    output = tmp_path / "gpu.jsonl"
    assert run.main(["--device", "cpu", "--quick", "--parts", part, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines
    assert all(line["part"] == part and line["device"] == "cpu" for line in lines)


def test_a_part_that_fails_leaves_its_error(tmp_path, monkeypatch):
    def broken(device, quick, time_left):
        yield {"value": 1}
        raise RuntimeError("no memory")

    monkeypatch.setitem(run.PARTS, "vae", broken)
    output = tmp_path / "gpu.jsonl"
    assert run.main(["--device", "cpu", "--quick", "--parts", "vae", "--output", str(output)]) == 1
    first, last = (json.loads(line) for line in output.read_text().splitlines())
    assert first["value"] == 1
    assert "no memory" in last["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    assert run.main(["--device", "cuda", "--output", str(tmp_path / "gpu.jsonl")]) == 2
