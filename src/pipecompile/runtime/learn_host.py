"""The caller's side of a stream that is learned from: samples with their targets in, outcomes out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from pipecompile.ir.learning import MARKED, SLIP, UNJUDGED, LearnPackage, LearnTimes, Outcome
from pipecompile.ir.program import HOST
from pipecompile.ir.timeline import Timeline
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.records import SAMPLES


class Learner(Protocol):
    """Carries out streams, one after the other: worker processes or the caller's own."""

    def begin(self, first: int) -> None:
        """Begin a stream whose first sample has this number."""
        ...

    def submit(self, leaves: Sequence[Any], target: Sequence[Any] | None, snapshot: bool) -> bool:
        """Hand over a sample, with a target or without; False while there is no room for it."""
        ...

    def end(self) -> bool:
        """No sample follows in this stream; False while there is no room for the word of it."""
        ...

    def wait(self, *, room: bool, timeout: float | None = None) -> None:
        """Block until a result is there, or (where asked) room, or the stream is through, or so many seconds.

        Raises:
            StepError: if a stage raises; the learner is closed then.
            WorkerDied, WorkerHung, PipelineError: if a device is lost.
        """
        ...

    def result(self) -> Outcome | None:
        """The next result, if it is there. Tensors own their memory."""
        ...

    @property
    def running(self) -> bool:
        """Whether a stream has begun and not all its updates are done."""
        ...

    @property
    def snapshots(self) -> list[dict[str, Any]]:
        """Parts of snapshots that stages have made; the reader takes them out."""
        ...

    def left_out(self) -> dict[int, int]:
        """Device -> how many updates it left out because their gradients were not finite, since last asked."""
        ...

    def timeline(self) -> Timeline | None:
        """What was measured of the latest samples; None where devices take turns."""
        ...

    def states(self) -> list[dict[str, Any]]:
        """Per device, between streams: ``state`` and ``groups`` of its optimizers, and its ``version``."""
        ...

    def load(self, state: Mapping[str, dict[str, Any]], settings: Mapping[str, Any], version: int | None) -> None:
        """Put optimizers' state back, change settings of all groups, and set the number of updates done."""
        ...

    def close(self) -> None:
        """End; may be repeated."""
        ...


class LearnHost:
    """The ports of the caller. ``submitted`` and ``delivered`` count messages, ends of streams among them."""

    def __init__(self, learn: LearnPackage, senders: Mapping[str, RingSender], receiver: RingReceiver) -> None:
        package = learn.package
        position = {name: i for i, name in enumerate(package.input_names)}
        edges = [edge for edge in package.program.edges if edge.source == HOST]
        self.inputs = [
            (senders[e.name], [position[v] for v in e.values if v != SLIP], SLIP in e.values)
            for e in edges
            if not e.kind
        ]
        self.target = next((senders[e.name] for e in edges if e.kind == "target"), None)
        self.senders = [senders[e.name] for e in edges]
        self.receiver = receiver
        result = next(e for e in package.program.edges if e.kind == "result")
        self._where = [result.values.index(ref.name) for ref in package.outputs]
        self._slips = [torch.tensor([what] + [0] * learn.stages) for what in range((MARKED | UNJUDGED) + 1)]
        self.submitted = self.delivered = 0
        self._entered: deque[float] = deque()
        self._times: deque[tuple[int, LearnTimes]] = deque(maxlen=SAMPLES)
        self._end, self._offset = -1, 0
        receiver.post_all()

    @property
    def ended(self) -> bool:
        """Whether the end of the stream has come out of the last stage."""
        return self._end >= 0 and self.delivered > self._end

    def begin(self, first: int) -> None:
        """A new stream, whose first sample has this number."""
        self._end, self._offset = -1, first - self.submitted

    def times(self) -> tuple[dict[int, float], dict[int, float]]:
        """When the latest samples that are through entered and left, by number."""
        known = list(self._times)
        return {sample: each.entered for sample, each in known}, {sample: each.left for sample, each in known}

    def room(self) -> bool:
        """Whether every input ring has a posted slot."""
        return all(sender.ready() for sender in self.senders)

    def submit(self, leaves: Sequence[Any], target: Sequence[Any] | None, snapshot: bool) -> bool:
        """See :class:`Learner`."""
        if not self.room():
            return False
        sample = self.submitted
        slip = self._slips[MARKED * snapshot | UNJUDGED * (target is None)]
        with torch.no_grad():
            for sender, where, slips in self.inputs:
                values = [leaves[i] for i in where]
                sender.put(sample, *values, *([slip] if slips else []))
            if self.target is not None:
                if target is None:
                    self.target.fail(sample)
                else:
                    self.target.put(sample, *target)
        self._entered.append(clock())
        self.submitted = sample + 1
        return True

    def end(self) -> bool:
        """See :class:`Learner`."""
        if not self.room():
            return False
        for sender in self.senders:
            sender.fail(self.submitted)
        self._end = self.submitted
        self.submitted += 1
        return True

    def forget(self) -> None:
        """Let go of the rings' memory, for good."""
        self.inputs, self.senders, self.target = [], [], None
        del self.receiver

    def arrived(self) -> bool:
        """Whether the next result, or the end of the stream, is there."""
        return not self.ended and self.receiver.ready()

    def collect(self) -> Outcome | None:
        """The next result if it is there; takes the end of the stream, too."""
        if not self.arrived():
            return None
        sample = self.receiver.sample
        try:
            values = self.receiver.own()
        except SampleFailed:
            values = None
        self.receiver.post(sample + self.receiver.reach)
        self.delivered = sample + 1
        if values is None:
            return None
        slip, verdict = values[-2], values[-1]
        times = LearnTimes(self._entered.popleft(), clock())
        self._times.append((sample + self._offset, times))
        outputs = [values[i] for i in self._where]
        return Outcome(outputs, int(verdict[0]), float(verdict[1]), tuple(slip[1:].tolist()), times)


__all__ = ["LearnHost", "Learner"]
