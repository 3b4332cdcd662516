"""Where results go: nowhere, a growing ``.npy`` file, or JSON lines."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from pipecompile.errors import InputError
from pipecompile.ir.sample import Result
from pipecompile.ir.tree import Tree, flatten


class Sink(ABC):
    """Takes results one by one. A context manager; ``written`` results are in it, whole."""

    written = 0

    @abstractmethod
    def write(self, result: Result) -> None:
        """Take one result.

        Raises:
            InputError: if it cannot be written; those before it are safe.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish. May be repeated."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Nowhere(Sink):
    """Counts."""

    def close(self) -> None:
        """Nothing is open."""

    def write(self, result: Result) -> None:
        """Take one result."""
        self.written += 1


def open_sink(output: str | None, top: int) -> Sink:
    """The sink for ``--output``: None, ``-``, ``x.jsonl`` or ``x.npy``. Nothing is overwritten before the first result.

    Raises:
        InputError: if the file cannot be written, or is of no known kind.
    """
    if output is None:
        return Nowhere()
    if output == "-":
        return JsonLines(None, top)
    path = Path(output)
    if path.suffix == ".npy":
        return Array(path)
    if path.suffix == ".jsonl":
        return JsonLines(path, top)
    raise InputError(f"--output {output}: results can be written to a .npy or .jsonl file, or to - as JSON lines")


class _File(Sink):
    """A file that keeps whole results only, also when the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new = not path.exists()
        try:
            # Unbuffered: what was written is counted, and nothing is left to fail in close().
            self._file: BinaryIO | None = cast("BinaryIO", path.open("ab" if self._new else "r+b", buffering=0))
            if self._new:
                self._file.close()
                self._file = cast("BinaryIO", path.open("r+b", buffering=0))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    def _put(self, data: bytes) -> None:
        """Append, or leave the file as it was."""
        file = self._file
        assert file is not None
        if not self.written:
            self._truncate(0)
        begin = file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            self._truncate(begin)
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; the {self.written} results before are in it"
            ) from None
        self.written += 1

    def _truncate(self, size: int) -> None:
        file = self._file
        assert file is not None
        if file.seekable() and self.path.is_file():
            file.seek(size)
            file.truncate()

    def close(self) -> None:
        """Close the file; one that was made for nothing is removed."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if self._new and not self.written:
            self.path.unlink(missing_ok=True)


class Array(_File):
    """The first tensor of each result, along a new first axis. The file is valid after ``close()``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._like: np.ndarray[Any, Any] | None = None
        self._header = 0

    def write(self, result: Result) -> None:
        """Append the first tensor of a result."""
        leaves, _ = flatten(result.value)
        if not leaves:
            raise InputError("the model returns no tensor, so there is nothing to write")
        tensor: torch.Tensor = leaves[0].detach()
        if tensor.dtype is torch.bfloat16:
            tensor = tensor.float()  # NumPy has no bfloat16; every value of it is a float32
        row = np.asarray(tensor.resolve_conj().resolve_neg().numpy(), order="C")
        if self._like is None:
            head = self._head(row, 0)
            self._like, self._header = row, len(head)
            self._put(head + row.tobytes())
            return
        if row.shape != self._like.shape or row.dtype != self._like.dtype:
            raise InputError(
                f"a result has shape {row.shape}, those before {self._like.shape}: they cannot be one .npy file. "
                "Write a .jsonl file"
            )
        self._put(row.tobytes())

    def _head(self, row: np.ndarray[Any, Any], count: int) -> bytes:
        """A header; NumPy leaves room in it for the first axis to grow."""
        import io

        made = io.BytesIO()
        fields = {
            "descr": np.lib.format.dtype_to_descr(row.dtype),
            "fortran_order": False,
            "shape": (count, *row.shape),
        }
        np.lib.format.write_array_header_2_0(made, fields)
        return made.getvalue()

    def close(self) -> None:
        """Write the number of results into the header."""
        if self._file is not None and self._like is not None and self.written:
            head = self._head(self._like, self.written)
            assert len(head) == self._header
            if self._file.seekable():
                self._file.seek(0)
                self._file.write(head)
        super().close()


class JsonLines(_File):
    """A line a result: its number, time stamp, latency, and of every tensor the largest values.

    ``top`` values of each tensor are written with their places, or all of them for 0. What JSON has
    no number for (NaN, infinity) is null.
    """

    def __init__(self, path: Path | None, top: int) -> None:
        self._top = top
        self._standard = path is None
        self._file = None
        if path is not None:
            super().__init__(path)

    def write(self, result: Result) -> None:
        """Append a line."""
        record = result.record
        leaves, tree = flatten(result.value)
        names = list(_names(tree, ""))
        line = {
            "sample": record.sequence,
            "pts": record.pts,
            "latency_ms": round(record.latency * 1e3, 3),
            "outputs": {name or "output": _tensor(leaf, self._top) for name, leaf in zip(names, leaves, strict=True)},
        }
        text = json.dumps(line) + "\n"
        if self._standard:
            sys.stdout.write(text)
            sys.stdout.flush()
            self.written += 1
        else:
            self._put(text.encode())


def _names(tree: Tree, path: str) -> Iterator[str]:
    """The path to each tensor of a result, such as ``scores`` or ``hidden.0``."""
    if tree.kind == "leaf":
        yield path
    for number, child in enumerate(tree.children):
        key = tree.keys[number] if tree.keys else number
        yield from _names(child, f"{path}.{key}" if path else str(key))


def _tensor(tensor: torch.Tensor, top: int) -> dict[str, Any]:
    shape = list(tensor.shape)
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if not top or flat.is_complex():
        values = torch.view_as_real(flat) if flat.is_complex() else flat
        return {"shape": shape, "values": [_number(value) for value in values.tolist()]}
    values, places = flat.to(torch.float64).topk(min(top, len(flat)))
    # A vector's place is one number; ones around it, such as a batch of one, say nothing.
    long = [dim for dim, size in enumerate(shape) if size > 1]
    found: list[Any] = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        index = [int(i) for i in np.unravel_index(place, shape)] if shape else [0]
        found.append([index[long[0]] if len(long) == 1 else index if long else 0, _number(value)])
    return {"shape": shape, "top": found}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in cast("list[Any]", value)]
    return value if not isinstance(value, float) or math.isfinite(value) else None
