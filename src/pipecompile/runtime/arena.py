"""Weights in shared memory: the model's own parameters become views of what the workers map."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipecompile.errors import PipecompileError
from pipecompile.runtime.allocator import give_back
from pipecompile.runtime.channels.cells import aligned
from pipecompile.runtime.channels.shared_memory import allocate, attach


class Arena:
    """One piece of shared memory that holds whole storages, each at a multiple of the alignment.

    An arena lives as long as a pipeline uses it; its memory as long as a tensor does.
    """

    def __init__(self, nbytes: int) -> None:
        self.fd = allocate("weights", nbytes)
        weakref.finalize(self, os.close, self.fd)
        self.memory = attach(self.fd)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.nbytes = nbytes

    def offset(self, address: int) -> int | None:
        """Where in the arena an address lies, or None if elsewhere."""
        return address - self.start if self.start <= address < self.start + self.nbytes else None


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


class Weights:
    """Named tensors that live in arenas, and their description for the workers."""

    def __init__(self, arenas: tuple[Arena, ...], entries: dict[str, dict[str, Any]], homes: dict[str, Any]) -> None:
        self.arenas, self._entries, self._homes = arenas, entries, homes

    def describe(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """JSON data for :func:`open_state`: arena number, place of the storage and layout in it."""
        return [self._entries[name] for name in names]

    def detached(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of tensors that no longer are what the workers see.

        ``load_state_dict(assign=True)``, ``.double()`` and the like replace tensors or their
        memory without a word; a pipeline must be started anew then.
        """
        return [name for name, tensor in tensors.items() if self._homes.get(name) != _home(tensor)]


def adopt(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Move the storages of ``tensors`` into shared memory; each tensor keeps its identity and layout.

    Every distinct storage is moved once and whole, so that ties, strides and offsets survive.
    Storages in an arena of a living pipeline stay where they are. The tensors then share memory
    with the workers: in-place changes on either side are seen by the other.

    Raises:
        PipecompileError: for tensors that are not plain CPU memory.
    """
    for name, tensor in tensors.items():
        _refuse(name, tensor)
    with torch.inference_mode(False), torch.no_grad():
        return _adopt(tensors)


def _adopt(tensors: Mapping[str, torch.Tensor]) -> Weights:
    alive = tuple(_arenas)
    used: dict[Arena, int] = {}
    moves: dict[int, tuple[int, int]] = {}
    places: dict[int, tuple[Arena, int]] = {}
    total = 0
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if not nbytes or address in moves or address in places:
            continue
        found = [(arena, offset) for arena in alive if (offset := arena.offset(address)) is not None]
        if found:
            places[address] = found[0]
        else:
            moves[address] = (total, nbytes)
            total = aligned(total + nbytes)
    storages: dict[int, torch.UntypedStorage] = {}
    fresh = Arena(total) if moves else None
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        place: tuple[Arena, int] | None = places.get(address)
        if fresh is not None and address in moves:
            place = fresh, moves[address][0]
            if address not in storages:
                moved = torch.frombuffer(fresh.memory, dtype=torch.uint8, count=nbytes, offset=place[1])
                moved.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
                storages[address] = moved.untyped_storage()
        entries[name] = {
            "arena": used.setdefault(place[0], len(used)) if place else -1,
            "offset": place[1] if place else 0,
            "nbytes": nbytes,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "storage_offset": tensor.storage_offset(),
            "requires_grad": tensor.requires_grad,
        }
    # Only now, when nothing can fail any more for want of memory, change the model.
    for name, tensor in tensors.items():
        storage = storages.get(tensor.untyped_storage().data_ptr())
        if storage is not None:
            view = torch.empty(0, dtype=tensor.dtype)
            view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            _replace(name, tensor, view)
    if fresh is not None:
        _arenas.add(fresh)
        # The storages the weights had are free now, but lie between blocks in use.
        give_back()
    return Weights(tuple(used), entries, {name: _home(tensor) for name, tensor in tensors.items()})


def open_state(fds: Sequence[int], entries: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, ...]:
    """The tensors described by ``entries`` over the arenas behind ``fds``; storages shared as in the model."""
    memories: list[mmap.mmap] = [attach(fd) for fd in fds]
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    tensors: list[torch.Tensor] = []
    for entry in entries:
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        if entry["arena"] < 0:
            empty = torch.empty_strided(entry["shape"], entry["stride"], dtype=dtype)
            tensors.append(empty.requires_grad_(entry["requires_grad"]))
            continue
        key = entry["arena"], entry["offset"]
        if key not in storages:
            memory = memories[entry["arena"]]
            whole = torch.frombuffer(memory, dtype=torch.uint8, count=entry["nbytes"], offset=entry["offset"])
            storages[key] = whole.untyped_storage()
        tensor = torch.empty(0, dtype=dtype)
        tensor = tensor.set_(storages[key], entry["storage_offset"], entry["shape"], entry["stride"])
        # Even without gradients, matmul rounds differently for a weight that requires them.
        tensors.append(tensor.requires_grad_(entry["requires_grad"]))
    return tuple(tensors)


def _home(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _replace(name: str, tensor: torch.Tensor, view: torch.Tensor) -> None:
    try:
        if tensor.is_inference():
            # Assigning to .data would leave half an inference tensor, which autograd refuses.
            with torch.inference_mode(True):
                tensor.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())
        else:
            tensor.data = view
    except RuntimeError as error:
        raise PipecompileError(f"the memory of weight {name!r} cannot be shared with workers: {error}") from error


def _refuse(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        trouble = "is on the meta device and has no data; load its weights first"
    elif tensor.device.type != "cpu":
        trouble = f"is on {tensor.device}; move the model to the CPU before compiling for CPU workers"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        trouble = f"has layout {tensor.layout}; only plain strided tensors can be shared, so call .to_dense() first"
    elif tensor.is_conj() or tensor.is_neg():
        trouble = "is lazily conjugated or negated; call .resolve_conj().resolve_neg() first"
    else:
        return
    raise PipecompileError(f"weight {name!r} {trouble}")
