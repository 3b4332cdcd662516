"""Files of results: what is in them, dtype by dtype, and what cannot be in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipecompile.cli.sinks import open_sink
from pipecompile.errors import InputError
from pipecompile.ir.sample import Record, Result


def result(value: Any, number: int = 0) -> Result:
    return Result(value, Record(number, number / 10, 0.0, 0.001, 0.004))


def test_an_array_grows_in_place_whatever_its_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16):
        rows = [torch.randn(2, 3).to(dtype) for _ in range(1234)]
        with open_sink(str(tmp_path / "x.npy"), 5) as sink:
            for row in rows:
                sink.write(result({"first": row.t().contiguous().t(), "second": torch.zeros(9)}))
        got = torch.from_numpy(np.load(tmp_path / "x.npy"))
        expected = torch.stack(rows)
        assert torch.equal(got, expected.float() if dtype is torch.bfloat16 else expected)


def test_scalars_and_empty_results_make_arrays_too(tmp_path: Path) -> None:
    for shape in ((), (0, 4)):
        with open_sink(str(tmp_path / "x.npy"), 5) as sink:
            for _ in range(3):
                sink.write(result(torch.zeros(shape)))
        assert np.load(tmp_path / "x.npy").shape == (3, *shape)


def test_results_of_two_shapes_are_refused_and_those_before_kept(tmp_path: Path) -> None:
    with open_sink(str(tmp_path / "x.npy"), 5) as sink:
        sink.write(result(torch.zeros(2, 3)))
        with pytest.raises(InputError, match=r"a result has shape \(3, 3\), those before \(2, 3\).*\.jsonl"):
            sink.write(result(torch.zeros(3, 3)))
    assert np.load(tmp_path / "x.npy").shape == (1, 2, 3)


def test_a_result_without_a_tensor_cannot_be_written(tmp_path: Path) -> None:
    with open_sink(str(tmp_path / "x.npy"), 5) as sink, pytest.raises(InputError, match="no tensor"):
        sink.write(result({"nothing": None}))
    assert not (tmp_path / "x.npy").exists()


def test_lines_of_every_kind_of_tensor(tmp_path: Path) -> None:
    value = {
        "flags": torch.tensor([True, False]),
        "whole": torch.tensor([[3], [7]]),
        "picture": torch.arange(12.0).reshape(1, 3, 4),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "wave": torch.tensor([1 + 2j]),
        "odd": torch.tensor([float("inf"), 1.0]),
    }
    with open_sink(str(tmp_path / "x.jsonl"), 2) as sink:
        sink.write(result(value, 4))
    line = json.loads((tmp_path / "x.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["sample"], line["pts"], line["latency_ms"]) == (4, 0.4, 4.0)
    assert line["outputs"] == {
        "flags": {"shape": [2], "top": [[0, 1.0], [1, 0.0]]},
        "whole": {"shape": [2, 1], "top": [[1, 7.0], [0, 3.0]]},
        "picture": {"shape": [1, 3, 4], "top": [[[0, 2, 3], 11.0], [[0, 2, 2], 10.0]]},
        "one": {"shape": [], "top": [[0, 2.5]]},
        "none": {"shape": [0, 3], "top": []},
        "wave": {"shape": [1], "values": [[1.0, 2.0]]},
        "odd": {"shape": [2], "top": [[0, None], [1, 1.0]]},
    }
    with open_sink(str(tmp_path / "x.jsonl"), 0) as sink:
        sink.write(result((value["whole"], [value["flags"]])))
    line = json.loads((tmp_path / "x.jsonl").read_text())
    assert line["outputs"] == {"0": {"shape": [2, 1], "values": [3, 7]}, "1.0": {"shape": [2], "values": [True, False]}}
