"""When each piece of a training step began and ended on one device, and the timeline that makes of all of them.

The generated functions of the stages are what is timed; their calls follow the order of the device's program,
which says what micro-batch each belongs to. Waits come from the records of the ports.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipecompile.ir.program import DeviceProgram, Op, Program
from pipecompile.ir.timeline import Activity, Event, Timeline
from pipecompile.runtime.channels.link import PortInfo
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.records import Wait

#: What a generated function does, by its name without the stage.
_OPS: Mapping[str, Op] = {
    "forward": Op.FORWARD,
    "again": Op.RECOMPUTE,
    "backward": Op.BACKWARD,
    "backward_input": Op.BACKWARD_INPUT,
    "backward_weight": Op.BACKWARD_WEIGHT,
}
_NAME = re.compile(rf"({'|'.join(_OPS)})_(\d+)")

#: Operation, stage, and the seconds on the clock at which it began and ended.
Span = tuple[str, int, float, float]


class Spans:
    """The spans of the step under way, or of the latest."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.clock: Callable[[], Any] = clock
        """What reads the time; elsewhere than on the host it may be known in seconds only later."""

    def watch(self, namespace: dict[str, Any]) -> None:
        """Time every call of the stages' functions in a generated module."""
        for name, function in list(namespace.items()):
            if found := _NAME.fullmatch(name):
                namespace[name] = self.timed(_OPS[found[1]], int(found[2]), function)

    def timed(self, op: Op, stage: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls are noted; one that raises is not."""
        word, spans = op.value, self.spans

        def call(*arguments: Any) -> Any:
            begin = self.clock()
            result = function(*arguments)
            spans.append((word, stage, begin, self.clock()))
            return result

        return call

    def clear(self) -> None:
        """Begin a step."""
        self.spans.clear()


@dataclass(frozen=True)
class DeviceSpans:
    """What one device did in a step that ended at ``end``: ``spans`` of work, ``waits`` at the ``ports``."""

    device: int
    spans: Sequence[Span]
    waits: Sequence[Wait] = ()
    ports: Sequence[PortInfo] = ()
    end: float = 0.0


def step_timeline(program: Program, devices: Iterable[DeviceSpans]) -> Timeline:
    """The measured timeline of one step, from the first thing a device did to the last."""
    order = {device.device: device for device in program.devices}
    events: list[Event] = []
    for found in devices:
        events += [*_work(order[found.device], found.spans), *_waits(found, program)]
    origin = min((event.start for event in events), default=0.0)
    shifted = sorted(
        (Event(e.device, e.stage, e.activity, e.sample, e.start - origin, e.end - origin, e.edge) for e in events),
        key=lambda event: (event.start, event.end, event.device),
    )
    end = max((event.end for event in shifted), default=0.0)
    return Timeline(tuple(shifted), "measured", (end,), (end,))


def _work(device: DeviceProgram, spans: Sequence[Span]) -> Iterable[Event]:
    samples: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for step in device.warm_up:
        samples[step.op.value, step.stage].append(step.sample)
    coming = {key: iter(found) for key, found in samples.items()}
    for word, stage, begin, end in spans:
        activity: Activity = word  # type: ignore[assignment]
        yield Event(device.device, stage, activity, next(coming[word, stage]), begin, end)


def _waits(found: DeviceSpans, program: Program) -> Iterable[Event]:
    """Waits for messages and for slots, and what a message costs its sender: until it goes on with something else."""
    begins = sorted([*(span[2] for span in found.spans), *(wait.begin for wait in found.waits)])
    for wait in found.waits:
        if not wait.end or not 0 <= wait.port < len(found.ports):
            continue
        port = found.ports[wait.port]
        sample = 0 if port.edge.kind == "tied" else wait.sample % program.micro_batches
        yield Event(found.device, port.stage, "wait", sample, wait.begin, wait.end, port.edge.name)
        if not port.receives:
            following = next((begin for begin in begins if begin >= wait.end), max(found.end, wait.end))
            yield Event(found.device, port.stage, "SEND", sample, wait.end, following, port.edge.name)


__all__ = ["DeviceSpans", "Spans", "step_timeline"]
