"""What each device did when: written by the worker into shared memory, read by the parent at any time.

One record a wait: number of the port, sample, when the wait began, when it ended (0: it has not).
The time between two waits is what the device did in between. So one small ring serves both the
measured timeline and the watch for devices that hang, without a message.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipecompile.ir.timeline import Event, Timeline
from pipecompile.runtime.channels.link import PortInfo

#: Samples that stay on record.
SAMPLES = 4096

_HEADER = 64
_AWAKE = 32
_FIELDS = 4
_RECORD = 8 * _FIELDS


@dataclass(frozen=True)
class Wait:
    """One record. ``end`` is 0 while the device still waits."""

    port: int
    sample: int
    begin: float
    end: float


class Records:
    """The ring of one device. ``capacity`` records; both sides derive it from the number of ports."""

    def __init__(self, memory: mmap.mmap | bytes, ports: int) -> None:
        self.capacity = SAMPLES * max(1, ports)
        view = memoryview(memory)
        self.count = view[:_HEADER].cast("q")
        self.awake = view[_AWAKE : _AWAKE + 8].cast("d")
        """Until when the device had better not sleep while it waits; written by the parent."""
        self.log = view[_HEADER : _HEADER + self.capacity * _RECORD].cast("d")

    @staticmethod
    def nbytes(ports: int) -> int:
        """Bytes of shared memory the ring takes."""
        return _HEADER + SAMPLES * max(1, ports) * _RECORD

    def frozen(self) -> Records:
        """A private copy, for after the worker and its memory are gone."""
        made = Records.__new__(Records)
        made.capacity, made.count = self.capacity, memoryview(bytes(self.count)).cast("q")
        made.log = memoryview(bytes(self.log)).cast("d")
        made.awake = self.awake
        return made

    def last(self) -> Wait | None:
        """The latest wait, or None if the device has not begun."""
        count = self.count[0]
        return self._record(count - 1) if count else None

    def seconds(self, ports: Sequence[PortInfo], sample: int) -> float:
        """See :func:`computed`."""
        count = self.count[0]
        return computed(ports, self._record, max(0, count - self.capacity + 1), count, sample)

    def all(self) -> list[Wait]:
        """Everything still on record, oldest first."""
        count = self.count[0]
        return [self._record(k) for k in range(max(0, count - self.capacity + 1), count)]

    def _record(self, number: int) -> Wait:
        at = (number % self.capacity) * _FIELDS
        port, sample, begin, end = self.log[at : at + _FIELDS].tolist()
        return Wait(int(port), int(sample), begin, end)


def computed(ports: Sequence[PortInfo], record: Callable[[int], Wait], low: int, high: int, sample: int) -> float:
    """Seconds a device computed on a recent sample; nan where that is not on record any more.

    Args:
        ports: what port numbers mean.
        record: wait by number.
        low: the oldest number on record.
        high: one beyond the latest number.
        sample: searched from the latest wait backwards.
    """
    until = math.nan
    for number in range(high - 1, low - 1, -1):
        wait = record(number)
        if wait.sample < sample:
            break
        if wait.sample == sample and ports[wait.port].receives and wait.end:
            return until - wait.end
        until = wait.begin
    return math.nan


@dataclass(frozen=True)
class DeviceRecord:
    """The waits of one device and what its port numbers mean."""

    device: int
    ports: Sequence[PortInfo]
    waits: Sequence[Wait]


def timeline(records: Iterable[DeviceRecord], submitted: dict[int, float], finished: dict[int, float]) -> Timeline:
    """A measured timeline of the samples whose submission is still known.

    Args:
        records: what the devices did.
        submitted: sample -> when the caller submitted it.
        finished: sample -> when the caller got its result.
    """
    origin = min(submitted.values(), default=0.0)
    events = [
        event for record in records for event in _events(record, origin) if event.sample in submitted and event.end >= 0
    ]
    events.sort(key=lambda event: (event.start, event.device))
    done = sorted(sample for sample in finished if sample in submitted)
    return Timeline(
        tuple(events),
        "measured",
        latencies=tuple(finished[sample] - submitted[sample] for sample in done),
        finishes=tuple(finished[sample] - origin for sample in done),
    )


def _events(record: DeviceRecord, origin: float) -> Iterable[Event]:
    for number, wait in enumerate(record.waits):
        if not wait.end:
            continue
        port = record.ports[wait.port]
        begin, end = max(0.0, wait.begin - origin), wait.end - origin
        yield Event(record.device, port.stage, "wait", wait.sample, begin, end, port.edge.name)
        if number + 1 == len(record.waits):
            continue
        following = record.waits[number + 1]
        until = following.begin - origin
        if not port.receives:
            yield Event(record.device, port.stage, "SEND", wait.sample, end, until, port.edge.name)
            continue
        after = record.ports[following.port]
        # A stage with several inputs computes after the last of them.
        if not (after.receives and after.stage == port.stage and following.sample == wait.sample):
            yield Event(record.device, port.stage, "BW" if port.edge.backward else "F", wait.sample, end, until)
