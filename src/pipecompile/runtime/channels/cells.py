"""One value of a message as it lies in a ring slot: written by the sender, read in place by the receiver."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from pipecompile.errors import InputError
from pipecompile.ir.graph import ALIGNMENT, TensorSpec, evaluate

_WORD = 8


class Cell(Protocol):
    """The place of one value in one slot."""

    def store(self, value: Any) -> None:
        """Copy ``value`` in.

        Raises:
            InputError: if it does not fit the spec the program was compiled for.
        """
        ...

    def load(self) -> Any:
        """The value in place: a tensor over the slot's memory, or a Python number."""
        ...

    def own(self) -> Any:
        """The value as a copy that outlives the slot, strides kept."""
        ...

    def check(self, value: Any) -> None:
        """Raise what :meth:`store` would raise, without writing."""
        ...

    def size(self) -> int:
        """Bytes of the value now in place."""
        ...


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def capacity(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Aligned bytes a value of this spec needs in a slot; ``sizes`` bound the dynamic symbols."""
    if spec.kind != "tensor":
        return ALIGNMENT
    if not spec.dynamic:
        return aligned(spec.nbytes)
    # One more line than the limit, because the first element may start anywhere within a line.
    return _dynamic_header(spec) + aligned(evaluate(spec.limit, sizes)) + ALIGNMENT


def make_cell(
    memory: mmap.mmap, offset: int, name: str, spec: TensorSpec, room: int, card: torch.Tensor | None = None
) -> Cell:
    """The cell for a value called ``name`` at ``offset`` of ``memory``, ``room`` bytes long.

    With ``card``, bytes of the same layout elsewhere, tensors lie there, and are copied without waiting for the copy.
    """
    if spec.kind != "tensor":
        return NumberCell(memory, offset, name, spec)
    if spec.dynamic:
        return DynamicCell(memory, offset, name, spec, room, card)
    return TensorCell(memory if card is None else card, offset, name, spec)


def disjoint(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two indices surely share an address (sufficient, as torch's own test is)."""
    reach = 0
    for step, size in sorted((abs(step), size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if size == 0:
            return True
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True


class TensorCell:
    """A tensor of fixed layout. Its view of the slot is made once."""

    __slots__ = ("_copy", "_dense", "_disjoint", "_dtype", "_flat", "_name", "_shape", "_spec", "_view")

    def __init__(self, memory: mmap.mmap | torch.Tensor, offset: int, name: str, spec: TensorSpec) -> None:
        self._name, self._spec = name, spec
        self._flat, self._view = _map(memory, offset + spec.skew, spec.torch_dtype, spec.shape, spec.stride)
        self._shape, self._dtype = self._view.shape, self._view.dtype
        self._disjoint = disjoint(spec.shape, spec.stride)
        self._dense = self._disjoint and spec.extent == self._view.numel()
        copy, waits = self._view.copy_, isinstance(memory, mmap.mmap)
        self._copy: Callable[[torch.Tensor], Any] = copy if waits else partial(copy, non_blocking=True)

    def store(self, value: Any) -> None:
        """Copy the tensor in."""
        self.check(value)
        if self._disjoint:
            self._copy(value)
        else:
            self._flat.copy_(_flat(value, self._flat.numel()), non_blocking=True)

    def check(self, value: Any) -> None:
        """Compare shape and dtype; strides only where the copy depends on them."""
        try:
            if value.shape == self._shape and value.dtype is self._dtype:
                if self._disjoint or tuple(value.stride()) == self._spec.stride:
                    return
                found = f"strides {tuple(value.stride())}, expected {self._spec.stride} (elements that share memory)"
                raise InputError(f"value {self._name!r} has {found}; compile with a contiguous example")
        except AttributeError:
            pass
        raise InputError(_mismatch(self._name, value, f"{self._spec.dtype} tensor of shape {self._spec.shape}"))

    def load(self) -> torch.Tensor:
        """The view made at the start."""
        return self._view

    def own(self) -> torch.Tensor:
        """A copy with the same strides."""
        if self._dense:
            return self._view.clone()
        return self._flat.clone().as_strided(self._spec.shape, self._spec.stride)

    def size(self) -> int:
        """Fixed by the spec."""
        return self._spec.nbytes


class NumberCell:
    """A Python int, float or bool, as an eight-byte scalar."""

    __slots__ = ("_box", "_kind", "_name")

    def __init__(self, memory: mmap.mmap, offset: int, name: str, spec: TensorSpec) -> None:
        kinds: dict[str, type] = {"int": int, "float": float, "bool": bool}
        self._name, self._kind = name, kinds[spec.kind]
        words = memoryview(memory)[offset : offset + _WORD]
        self._box: Any = words.cast("d") if spec.kind == "float" else words.cast("q")

    def store(self, value: Any) -> None:
        """Write the number."""
        self.check(value)
        self._box[0] = value

    def check(self, value: Any) -> None:
        """Accept numbers of the kind compiled for; an int is also a float."""
        fits = isinstance(value, self._kind) or (self._kind is float and isinstance(value, int))
        if not fits or (self._kind is int and not -(2**63) <= value < 2**63):
            raise InputError(_mismatch(self._name, value, f"Python {self._kind.__name__} of at most 64 bits"))

    def load(self) -> int | float | bool:
        """Read the number, with its type."""
        return self._kind(self._box[0])

    def own(self) -> int | float | bool:
        """Numbers are values anyway."""
        return self.load()

    def size(self) -> int:
        """One word."""
        return _WORD


class DynamicCell:
    """A tensor whose shape may change from message to message: the slot describes it."""

    __slots__ = ("_data", "_header", "_memory", "_name", "_rank", "_room", "_spec")

    def __init__(
        self, memory: mmap.mmap, offset: int, name: str, spec: TensorSpec, room: int, card: torch.Tensor | None = None
    ) -> None:
        header = _dynamic_header(spec)
        self._memory = memory if card is None else card
        self._name, self._spec, self._rank = name, spec, len(spec.shape)
        self._data, self._room = offset + header, room - header
        self._header = memoryview(memory)[offset : offset + header].cast("q")

    def check(self, value: Any) -> None:
        """Compare dtype, rank and the room it takes."""
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype is not self._spec.torch_dtype
            or value.dim() != self._rank
        ):
            wanted = f"{self._spec.dtype} tensor of {self._rank} dimensions (dynamic, e.g. {self._spec.shape})"
            raise InputError(_mismatch(self._name, value, wanted))
        needed = _extent(value.shape, value.stride()) * value.element_size()
        if value.data_ptr() % ALIGNMENT + needed > self._room:
            raise InputError(
                f"value {self._name!r} of shape {tuple(value.shape)} needs {needed} bytes, but the pipeline was "
                f"started with room for {self._room - ALIGNMENT}; start it with larger sizes"
            )

    def store(self, value: Any) -> None:
        """Write the layout, then the data at the alignment it has now."""
        self.check(value)
        shape, stride = tuple(value.shape), tuple(value.stride())
        skew = value.data_ptr() % ALIGNMENT
        self._header[0] = skew
        for i, number in enumerate((*shape, *stride), start=1):
            self._header[i] = number
        flat, view = _map(self._memory, self._data + skew, value.dtype, shape, stride)
        if disjoint(shape, stride):
            view.copy_(value, non_blocking=True)
        else:
            flat.copy_(_flat(value, flat.numel()), non_blocking=True)

    def load(self) -> torch.Tensor:
        """A view made from the slot's description."""
        return self._read()[1]

    def own(self) -> torch.Tensor:
        """A copy with the strides the sender's tensor had."""
        flat, view = self._read()
        if flat.numel() == view.numel() and disjoint(view.shape, view.stride()):
            return view.clone()
        return flat.clone().as_strided(view.shape, view.stride())

    def size(self) -> int:
        """From the description in the slot."""
        shape, stride = self._layout()
        return _extent(shape, stride) * self._spec.torch_dtype.itemsize

    def _layout(self) -> tuple[list[int], list[int]]:
        numbers = self._header.tolist()
        return numbers[1 : 1 + self._rank], numbers[1 + self._rank : 1 + 2 * self._rank]

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape, stride = self._layout()
        return _map(self._memory, self._data + self._header[0], self._spec.torch_dtype, shape, stride)


def _dynamic_header(spec: TensorSpec) -> int:
    return aligned(_WORD * (1 + 2 * len(spec.shape)))


def _map(
    memory: mmap.mmap | torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements from the first to the last addressed one, flat, and the strided view of them."""
    extent = _extent(shape, stride)
    if extent == 0:
        device = memory.device if isinstance(memory, torch.Tensor) else None
        empty = torch.empty(0, dtype=dtype, device=device)
        return empty, torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if isinstance(memory, torch.Tensor):
        # `.data` counts writes anew: one to another slot must not look to autograd like one to this.
        flat = memory.data[offset : offset + extent * dtype.itemsize].view(dtype)
    else:
        flat = torch.frombuffer(memory, dtype=dtype, count=extent, offset=offset)
    return flat, flat.as_strided(shape, stride)


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _flat(value: torch.Tensor, extent: int) -> torch.Tensor:
    # A lazily conjugated or negated tensor holds other bits than it means: copying resolves them.
    if value.is_conj() or value.is_neg():
        plain = torch.empty(extent, dtype=value.dtype, device=value.device)
        plain.copy_(value.as_strided((extent,), (1,)))
        return plain
    return value.as_strided((extent,), (1,))


def _mismatch(name: str, value: Any, wanted: str) -> str:
    if isinstance(value, torch.Tensor):
        found = f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    else:
        found = f"{value!r} ({type(value).__name__})"
    return f"value {name!r} is {found}; the pipeline was compiled for a {wanted}"
