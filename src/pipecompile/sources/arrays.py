"""Samples from an array on disk, and samples drawn at random."""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipecompile.errors import InputError
from pipecompile.sources.fit import Fit, item_of, package_of
from pipecompile.sources.source import Source, check_rate

#: Random samples drawn before they repeat: drawing one costs as much time as a small stage takes.
_DRAWN = 16


class NumpyFile(Source):
    """The entries of a ``.npy`` file along its first axis. The file is mapped, not read at once.

    Args:
        path: the file.
        like: a pipeline (or package) with one input: each entry is given its dtype, and its shape where that means
            no more than parting, joining or leaving out axes.
        transform: makes an item of a stream from an entry (a NumPy array); instead of ``like``.
            With neither, an item is the entry as a tensor.
        rate: entries a second, for the time stamps.
        realtime: give entries at that rate, as a live source.

    Raises:
        InputError: if the file cannot be read as an array or does not fit.
    """

    threaded: ClassVar[bool] = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        like: Any = None,
        transform: Callable[[np.ndarray[Any, Any]], Any] | None = None,
        rate: float = 1.0,
        realtime: bool = False,
    ) -> None:
        super().__init__(realtime=realtime)
        self.path, self._rate = Path(path), check_rate(rate)
        if not self.path.is_file():
            raise InputError(f"{self.path}: there is no such file")
        try:
            array: Any = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None
        except (ValueError, EOFError):
            # NumPy takes what it does not know for a pickle, and says so.
            raise InputError(f"{self.path} is no array as numpy.save writes it, or is cut short") from None
        if not isinstance(array, np.ndarray):
            raise InputError(f"{self.path} holds several arrays; save the one to stream as a .npy file")
        self._array: np.ndarray[Any, Any] = array
        if not array.dtype.isnative and array.dtype.kind in "biufc":
            self._array = array.astype(array.dtype.newbyteorder("="))  # torch knows this machine's byte order only
        if array.ndim == 0:
            raise InputError(f"{self.path} holds a single number: samples lie along the first axis of an array")
        self._make = transform or _entry
        if transform is None and like is not None:
            self._make = self._fit(Fit(package_of(like), str(self.path)))
        self.length = len(self._array)

    def _fit(self, fit: Fit) -> Callable[[np.ndarray[Any, Any]], Any]:
        spec, array = fit.spec, self._array
        size, shape = math.prod(spec.shape), array.shape[1:]
        if array.size != len(array) * size:
            raise InputError(
                f"{self.path} has shape {array.shape}: each entry along its first axis must hold the {size} values of "
                f"one input of shape {spec.shape}"
            )
        if not (_borders(shape) <= _borders(spec.shape) or _borders(spec.shape) <= _borders(shape)):
            raise InputError(
                f"{self.path} has entries of shape {shape}, one input has shape {spec.shape}: as many values, but in "
                "another order. Save the array with its axes in the model's order (numpy.moveaxis), or pass transform="
            )
        if array.dtype.kind not in "biufc":
            raise InputError(f"{self.path} holds {array.dtype}, which is no number")
        return fit.entry

    def _read(self, stop: threading.Event) -> Generator[tuple[float, Any]]:
        for index, entry in enumerate(self._array):
            yield index / self._rate, entry

    def _finish(self, raw: Any) -> Any:
        return self._make(raw)


class Random(Source):
    """``count`` samples of the shapes a pipeline was compiled for; the same ones every time.

    Floats are normal, integers and booleans are ones (valid as indices and masks). After sixteen
    samples they repeat, so that drawing them does not slow down what is measured.

    Args:
        count: how many.
        like: a pipeline or package.
        seed: of the generator.
        rate: samples a second, for the time stamps.
        realtime: give samples at that rate, as a live source.

    Raises:
        InputError: if ``count`` is negative or ``like`` is no pipeline.
    """

    threaded: ClassVar[bool] = False

    def __init__(self, count: int, *, like: Any, seed: int = 0, rate: float = 1.0, realtime: bool = False) -> None:
        super().__init__(realtime=realtime)
        if count < 0:
            raise InputError(f"count={count}: a number of samples is 0 or more")
        self.length, self._rate, self._seed = count, check_rate(rate), seed
        self._package = package_of(like)

    def _read(self, stop: threading.Event) -> Generator[tuple[float, Any]]:
        generator = torch.Generator().manual_seed(self._seed)
        drawn: list[Any] = []
        for index in range(self.length or 0):
            if index < _DRAWN:
                leaves = [random_tensor(spec.shape, spec.torch_dtype, generator) for spec in self._package.inputs]
                drawn.append(item_of(leaves, self._package))
            yield index / self._rate, drawn[index % _DRAWN]


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal floats; ones for integers and booleans."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(dtype)
    return torch.ones(tuple(shape), dtype=dtype)


def _borders(shape: Sequence[int]) -> set[int]:
    """After how many values an axis ends. Parting or joining axes adds or takes away some, another order moves them."""
    return set(accumulate((n for n in shape if n != 1), operator.mul))


def _entry(entry: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(entry))
