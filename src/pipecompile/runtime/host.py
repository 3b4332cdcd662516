"""The caller's side of a pipeline: samples in, results out, whatever carries them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipecompile.errors import InputError, ProgramError
from pipecompile.ir.package import Package
from pipecompile.ir.program import HOST
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.records import SAMPLES

#: Waking up costs about 0.1 ms of a core (caches included): worth saving where samples come as fast as this.
_FAST = 2e-3
#: Results to take the pace from: more than gather while the caller sleeps.
_PACE = 64


class Host:
    """The ports of the caller and the order of leaves, worked out once.

    Where stages are replicated, samples take other rings in turn, and after some the turns begin
    again: ``rounds`` are the output rings of each. So taking results in order needs no sorting.
    ``submitted`` and ``delivered`` count samples. Submitting and collecting touch separate parts,
    so one thread may do the one while another does the other.
    """

    def __init__(
        self, package: Package, senders: Mapping[str, RingSender], receivers: Mapping[str, RingReceiver]
    ) -> None:
        inputs = [edge for edge in package.program.edges if edge.source == HOST]
        outputs = [edge for edge in package.program.edges if edge.target == HOST]
        if not inputs or not outputs:
            raise ProgramError("the program needs an edge from the host and one to the host")
        position = {name: i for i, name in enumerate(package.input_names)}
        try:
            where = {e.name: tuple(position[value] for value in e.values) for e in inputs}
        except KeyError as error:
            raise ProgramError(f"an edge from the host carries {error}, which is no input of the model") from None
        self._leaves = len(package.inputs)
        period = math.lcm(*(edge.stride for edge in (*inputs, *outputs)))
        self._inputs = [[(senders[e.name], where[e.name]) for e in inputs if e.carries(n)] for n in range(period)]
        self.rounds = [[receivers[edge.name] for edge in outputs if edge.carries(n)] for n in range(period)]
        self._fewest = min(edge.reach for edge in (*inputs, *outputs))
        self.senders = [senders[edge.name] for edge in inputs]
        self._first = [senders[edge.name] for edge in inputs if edge.target == min(e.target for e in inputs)]
        self.receivers = [receivers[edge.name] for edge in outputs]
        # In each round there is one ring from each stage, in this order.
        from_each = list({edge.between: edge for edge in outputs}.values())
        found = {value: (e, v) for e, edge in enumerate(from_each) for v, value in enumerate(edge.values)}
        self._names = [(ref.kind, ref.name) for ref in package.outputs]
        missing = [ref.name for ref in package.outputs if ref.kind == "value" and ref.name not in found]
        if missing:
            raise ProgramError(f"no edge brings {missing} to the host")
        plain = all(ref.kind == "value" for ref in package.outputs)
        self._plain = [found[ref.name] for ref in package.outputs] if plain else None
        self._value_at, self._position = found, position
        self._keep = deque[Sequence[Any]]() if any(ref.kind == "input" for ref in package.outputs) else None
        self.submitted = self.delivered = 0
        self.started: deque[float] = deque(maxlen=SAMPLES)
        self.finished: deque[float] = deque(maxlen=SAMPLES)

    def open(self) -> None:
        """Post every slot of the output rings."""
        for receiver in self.receivers:
            receiver.post_all()

    def late(self, on: bool) -> None:
        """See ``Executor.late``."""
        for sender in self._first:
            sender.late(on)

    def room(self) -> bool:
        """Whether every input ring of the next sample has a posted slot."""
        return all(sender.ready() for sender, _ in self._inputs[self.submitted % len(self._inputs)])

    def submit(self, leaves: Sequence[Any]) -> int | None:
        """Put one sample into the input rings, or return None where one has no posted slot."""
        if len(leaves) != self._leaves:
            raise InputError(f"the pipeline takes {self._leaves} tensors and numbers, got {len(leaves)}")
        sample = self.submitted
        inputs = self._inputs[sample % len(self._inputs)]
        for sender, _ in inputs:
            if not sender.ready():
                return None
        # A copy out of a tensor that requires grad would make the slot part of its graph.
        if torch.is_grad_enabled():
            leaves = [leaf.detach() if getattr(leaf, "requires_grad", False) else leaf for leaf in leaves]
        if len(inputs) > 1:
            # All or nothing: no ring may get a sample that another one refuses.
            for sender, where in inputs:
                sender.check(tuple([leaves[i] for i in where]))
        # Counted first: the result may arrive, in another thread, before put() returns.
        self.started.append(clock())
        if self._keep is not None:
            self._keep.append(leaves)
        self.submitted = sample + 1
        try:
            for sender, where in inputs:
                sender.put(sample, *[leaves[i] for i in where])
        except BaseException:
            if inputs[0][0].sample == sample:
                self.submitted = sample
                self.started.pop()
                if self._keep is not None:
                    self._keep.pop()
            raise
        return sample

    def arrived(self) -> bool:
        """Whether the next result is complete, as far as already counted."""
        return all(receiver.available and receiver.delay() <= 0.0 for receiver in self._round())

    def something(self) -> bool:
        """Whether a part of the next result has arrived, as far as already counted."""
        return any(receiver.available for receiver in self._round())

    def delay(self) -> float:
        """Seconds until throttled messages of the next result that are here count as arrived."""
        return max([receiver.delay() for receiver in self._round()])

    def _round(self) -> list[RingReceiver]:
        """The rings that bring the next result."""
        return self.rounds[self.delivered % len(self.rounds)]

    def nap(self) -> float:
        """Seconds a caller who found no room may sleep through where results come fast, else 0.

        The caller shares the cores with the devices. Woken for every sample it took a quarter of
        the time of stages of 0.1 ms; so it lets half a ring of results gather meanwhile.
        """
        times = self.finished
        if len(times) < _PACE:
            return 0.0
        pace = (times[-1] - times[-_PACE]) / (_PACE - 1)
        return pace * self._fewest / 2 if pace < _FAST else 0.0

    def collect(self, weights: Mapping[str, torch.Tensor]) -> tuple[int, list[Any]]:
        """Take the next result, which must have arrived, and post its slots anew.

        Raises:
            SampleFailed: if a stage could not compute it; it is over then.
        """
        sample = self.delivered
        messages: list[list[Any]] = []
        failed: SampleFailed | None = None
        for receiver in self._round():
            try:
                message = receiver.own()
            except SampleFailed as error:
                message, failed = [], error
            assert message is not None, "the stream ended before its last result"
            messages.append(message)
            receiver.post(sample + receiver.reach)
        self.delivered = sample + 1
        self.finished.append(clock())
        leaves = self._keep.popleft() if self._keep is not None else ()
        if failed is not None:
            raise failed
        if self._plain is not None:
            return sample, [messages[e][v] for e, v in self._plain]
        return sample, [self._leaf(kind, name, messages, leaves, weights) for kind, name in self._names]

    def end(self) -> None:
        """No sample follows."""
        for sender in self.senders:
            sender.end()

    def drop(self) -> None:
        """Take what has arrived without looking at it, so that the devices can go on to their end."""
        for receiver in self.receivers:
            while not receiver.ended and receiver.ready():
                sample = receiver.sample
                if receiver.skip():
                    receiver.post(sample + receiver.reach)

    def forget(self) -> None:
        """Let go of the rings' memory; counts and times stay."""
        self.senders, self.receivers, self._inputs, self.rounds, self._first = [], [], [], [], []

    def _leaf(
        self,
        kind: str,
        name: str,
        messages: list[list[Any]],
        leaves: Sequence[Any],
        weights: Mapping[str, torch.Tensor],
    ) -> Any:
        if kind == "input":
            return leaves[self._position[name]]
        if kind == "state":
            return weights[name]
        e, v = self._value_at[name]
        return messages[e][v]

    def times(self) -> tuple[dict[int, float], dict[int, float]]:
        """Sample -> time of submission and of delivery, for the latest samples."""
        started, finished = list(self.started), list(self.finished)
        first, done = self.submitted - len(started), self.delivered - len(finished)
        return (
            {first + i: time for i, time in enumerate(started)},
            {done + i: time for i, time in enumerate(finished)},
        )
