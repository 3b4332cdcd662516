"""A card that computes on the host and writes down what was asked of it, and a search of what it wrote for races.

The search shares no code with the engine: it replays the record with vector clocks and compares every two accesses to
the same bytes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CALLER = 0


@dataclass
class Record(TorchDispatchMode):
    """What happened, in the order the host gave it: ``(what, lane, details)``."""

    events: list[tuple[str, int, Any]] = field(default_factory=list)
    lanes: Any = field(default_factory=lambda: itertools.count(1))
    marks: Any = field(default_factory=itertools.count)
    current: int = CALLER
    alive: dict[int, Any] = field(default_factory=dict)
    """Storages seen: none may be freed, and its address given to another, before the search."""

    def __post_init__(self) -> None:
        super().__init__()

    def note(self, what: str, lane: int, details: Any = None) -> None:
        self.events.append((what, lane, details))

    def span(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """Storage and the bytes from the first to the last element."""
        storage = tensor.untyped_storage()
        self.alive.setdefault(storage.data_ptr(), storage)
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return storage.data_ptr(), tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return result  # a view: nothing is read
        reads, writes = [], []
        named = dict(zip([a.name for a in schema.arguments], args, strict=False)) | (kwargs or {})
        for argument in schema.arguments:
            into = writes if argument.alias_info is not None and argument.alias_info.is_write else reads
            into += map(self.span, dense(named.get(argument.name)))
        writes += map(self.span, dense(result))
        self.note("op", self.current, (str(func), reads, writes))
        return result


def dense(nest: Any) -> list[torch.Tensor]:
    if isinstance(nest, (list, tuple)):
        return [leaf for part in nest for leaf in dense(part)]
    return [nest] if isinstance(nest, torch.Tensor) and nest.layout is torch.strided and nest.numel() else []


@dataclass
class RecordedLane:
    record: Record
    number: int

    @contextmanager
    def use(self) -> Generator[None]:
        before, self.record.current = self.record.current, self.number
        try:
            yield
        finally:
            self.record.current = before

    def mark(self) -> int:
        mark = next(self.record.marks)
        self.record.note("mark", self.number, mark)
        return mark

    def wait(self, mark: int) -> None:
        self.record.note("wait", self.number, mark)

    def keep(self, tensor: torch.Tensor) -> None:
        self.record.note("keep", self.number, tensor.untyped_storage().data_ptr())

    def finish(self) -> None:
        self.record.note("finish", self.number)


@dataclass
class RecordedCard:
    record: Record
    name: str = "card:0"
    cards: tuple[int, ...] = ()

    def lane(self) -> RecordedLane:
        return RecordedLane(self.record, next(self.record.lanes))

    def caller(self) -> RecordedLane:
        return RecordedLane(self.record, CALLER)

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.from_dlpack(torch.zeros(nbytes, dtype=torch.uint8))

    def near(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)


@dataclass(frozen=True)
class Access:
    """One operator's use of some bytes: its place in its lane, and how far it knew all lanes to be."""

    lane: int
    tick: int
    known: dict[int, int]
    begin: int
    end: int
    write: bool
    name: str


def races(record: Record) -> list[str]:
    """Every two uses of the same bytes in different lanes, one a write, that nothing orders; and unsafe frees.

    What one lane makes and another uses in the same step may be freed, and its memory given out again in the first
    lane, as soon as nobody holds it: the other must have kept it.
    """
    clocks: defaultdict[int, dict[int, int]] = defaultdict(dict)
    host: dict[int, int] = {}
    marks: dict[int, dict[int, int]] = {}
    accesses: defaultdict[int, list[Access]] = defaultdict(list)
    made: dict[int, int] = {}
    kept = {(lane, details) for what, lane, details in record.events if what == "keep"}
    found: list[str] = []
    for what, lane, details in record.events:
        clock = clocks[lane]
        if what == "mark":
            join(clock, host)  # an event recorded after the host waited comes after what it waited for
            marks[details] = dict(clock)
        elif what == "wait":
            join(clock, marks[details])
        elif what == "finish":
            join(host, clock)
        elif what == "op":
            join(clock, host)
            clock[lane] = clock.get(lane, 0) + 1
            known = dict(clock)
            name, reads, writes = details
            for spans, write in ((reads, False), (writes, True)):
                for storage, begin, end in spans:
                    if write and storage not in accesses:
                        made[storage] = lane
                    owner = made.get(storage, CALLER)
                    if CALLER not in (owner, lane) and owner != lane and (lane, storage) not in kept:
                        found.append(f"{name} in lane {lane} uses what lane {owner} made and may free")
                    accesses[storage].append(Access(lane, clock[lane], known, begin, end, write, name))
    for uses in accesses.values():
        if len({use.lane for use in uses}) > 1:
            found += [
                f"{a.name} in lane {a.lane} and {b.name} in lane {b.lane}"
                for a, b in itertools.combinations(uses, 2)
                if a.lane != b.lane and (a.write or b.write) and a.begin < b.end and b.begin < a.end
                and b.known.get(a.lane, 0) < a.tick
            ]  # fmt: skip
    return found


def join(clock: dict[int, int], other: dict[int, int]) -> None:
    for lane, tick in other.items():
        clock[lane] = max(clock.get(lane, 0), tick)
