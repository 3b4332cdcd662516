"""A schedule as data: per device a list of instructions, and the rings they use.

Text form, one instruction a word: ``0F3`` stage 0 computes sample 3; ``1RECV4@0>1`` stage 1
posts the receive of message 4 on edge ``0>1``; ``0SEND3@0>1`` stage 0 sends message 3.

A training step is a closed program whose samples are micro-batches: ``0B3`` stage 0 computes the
gradients of its inputs for micro-batch 3, ``0W3`` those of its weights, ``0BW3`` both at once;
``0R3`` its forward once more, so that it need not keep activations; ``0REDUCE0@2>0:tied`` adds what
stage 2 gives to the gradient of a weight both use; ``0STEP0`` updates the weights of stage 0.
Learning on a stream has the same instructions in an open program: ``0STEP3`` is the update whose
first sample is 3.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from pipecompile.errors import ProgramError
from pipecompile.ir.deal import Deal
from pipecompile.ir.graph import TensorSpec

#: The caller's side of the pipeline, as the source or target of an edge.
HOST = -1


class Op(StrEnum):
    """What an instruction does. ``F`` waits for the message of its sample on every edge it reads."""

    FORWARD = "F"
    SEND = "SEND"
    RECV = "RECV"
    BACKWARD_INPUT = "B"
    BACKWARD_WEIGHT = "W"
    BACKWARD = "BW"
    RECOMPUTE = "R"
    REDUCE = "REDUCE"
    STEP = "STEP"


#: What a device computes with one micro-batch, in contrast to messages and updates.
COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT, Op.BACKWARD, Op.RECOMPUTE})

_OPS = "|".join(sorted(Op, key=len, reverse=True))


@dataclass(frozen=True)
class Instruction:
    """One step of a device. In a loop body ``sample`` is relative, counted in turns of the loop.

    ``edge`` names the stages it joins; which ring of several between replicas is meant follows
    from the sample (see :attr:`Edge.between`).

    ``RECV`` posts a ring slot for a message (it never blocks by itself); ``FORWARD`` waits for
    the posted messages of its sample, computes, and thereby frees their slots; ``SEND`` waits
    until the receiver has posted the message, then copies it. What training adds waits for the
    messages it reads: a backward for its gradients, ``REDUCE`` for its one message a step.
    """

    op: Op
    stage: int
    sample: int
    edge: str = ""

    def __str__(self) -> str:
        """The text form, which :meth:`parse` reads back."""
        return f"{self.stage}{self.op}{self.sample}" + (f"@{self.edge}" if self.edge else "")

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Read the text form.

        Raises:
            ProgramError: if the text is not an instruction.
        """
        found = re.fullmatch(rf"(\d+)({_OPS})(-?\d+)(?:@(\S+))?", text)
        if found is None:
            raise ProgramError(f"not an instruction: {text!r} (expected e.g. '0F3' or '0SEND3@0>1')")
        return cls(Op(found[2]), int(found[1]), int(found[3]), found[4] or "")


@dataclass(frozen=True)
class Edge:
    """A ring of ``slots`` messages from one stage (or HOST) to another. One message a sample.

    ``values`` travel together; ``ahead`` is how many turns before the one that reads it a message
    is posted. In training, an edge to an earlier stage carries gradients: ``values`` names what
    they are the gradients of; one of kind ``gradient`` brings them from the caller, for results that
    went there. An edge of kind ``tied`` carries one message a step, the gradients summed over all
    micro-batches of the weights named. Between stages of one device nothing travels, and the edge
    has no slots. In learning, an edge of kind ``target`` brings the targets to the last stage, and
    one of kind ``result`` what the caller gets; values that begin with a colon are no values of the
    model.

    Replicas of a stage are dealt samples in turn: sample ``n`` goes from replica ``n % a`` of ``a``
    at the source to replica ``n % b`` of ``b`` at the target. Each pair between which a sample ever
    travels, those that agree modulo ``gcd(a, b)``, has a ring of its own; it carries every
    ``lcm(a, b)``-th sample. The caller is one replica.
    """

    source: int
    target: int
    values: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    ahead: int
    slots: int
    kind: Literal["", "tied", "gradient", "target", "result"] = ""
    source_replica: int = 0
    source_replicas: int = 1
    target_replica: int = 0
    target_replicas: int = 1

    @property
    def between(self) -> str:
        """The stages it joins, ``0>1``; the caller's side is ``host``. All rings of replicas share this."""
        return f"{_end(self.source)}>{_end(self.target)}" + (f":{self.kind}" if self.kind else "")

    @property
    def name(self) -> str:
        """``0>1``, and where an end is one of several replicas, which of them: ``0.1>1``."""
        source = _end(self.source, self.source_replica, self.source_replicas)
        target = _end(self.target, self.target_replica, self.target_replicas)
        return f"{source}>{target}" + (f":{self.kind}" if self.kind else "")

    @cached_property
    def stride(self) -> int:
        """From one sample it carries to the next."""
        return math.lcm(self.source_replicas, self.target_replicas)

    @cached_property
    def first(self) -> int:
        """The first sample it carries.

        Raises:
            ProgramError: if it would carry none.
        """
        for sample in range(self.stride):
            if sample % self.source_replicas == self.source_replica and (
                sample % self.target_replicas == self.target_replica
            ):
                return sample
        raise ProgramError(f"edge {self.name} joins replicas that share no sample")

    @property
    def reach(self) -> int:
        """Samples from a message to the one that takes its slot over."""
        return self.slots * self.stride

    def carries(self, sample: int) -> bool:
        """Whether the message of that sample travels here."""
        return sample % self.stride == self.first

    @property
    def backward(self) -> bool:
        """Whether it carries the gradients of each micro-batch."""
        return self.kind == "gradient" or (not self.kind and HOST < self.target < self.source)

    @property
    def forward(self) -> bool:
        """Whether it carries the values of each micro-batch."""
        return not self.kind and not self.backward

    @property
    def tied(self) -> bool:
        """Whether it carries one message a step, gradients of tied weights."""
        return self.kind == "tied"

    @property
    def nbytes(self) -> int:
        """Bytes of one message."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class DeviceProgram:
    """Instructions of one device: ``warm_up`` once, ``body`` once a turn, ``drain`` once.

    ``stages`` run on this device, of which it is one of ``replicas``: its turns are for the samples
    ``replica``, ``replica + replicas`` and so on. A turn of the body is for ``turn`` samples. A closed
    schedule (a training step) is all warm-up.
    """

    device: int
    stages: tuple[int, ...]
    warm_up: tuple[Instruction, ...]
    body: tuple[Instruction, ...]
    drain: tuple[Instruction, ...] = ()
    replica: int = 0
    replicas: int = 1
    turn: int = 1


@dataclass(frozen=True)
class Program:
    """What every device does, in order. Read by verify, simulate, codegen and report.

    A training step may be that of ``data_parallel`` equal pipelines with equal weights, which are dealt the
    micro-batches in turn. With ``n`` stages each, those of pipeline ``k`` are numbered from ``k * n`` on; each
    pipeline counts its micro-batches from 0.
    """

    devices: tuple[DeviceProgram, ...]
    edges: tuple[Edge, ...]
    schedule: str = "stream"
    data_parallel: int = 1

    @property
    def closed(self) -> bool:
        """Whether it ends by itself: a training step rather than a stream."""
        return not any(device.body for device in self.devices)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a closed program computes; of data-parallel pipelines, each of them."""
        return 1 + max((s.sample for d in self.devices for s in d.warm_up if s.op in COMPUTE), default=-1)

    def deal(self, stage: int) -> Deal:
        """Which micro-batches of a step the pipeline of a stage is dealt."""
        every = sum(len(device.stages) for device in self.devices) // self.data_parallel
        return Deal(stage // every, self.data_parallel)

    def edge(self, name: str) -> Edge:
        """The edge of that name.

        Raises:
            ProgramError: if there is none.
        """
        for edge in self.edges:
            if edge.name == name:
                return edge
        raise ProgramError(f"the program has no edge {name!r}")

    def rings(self, between: str) -> tuple[Edge, ...]:
        """All rings between two stages, one unless a stage is replicated.

        Raises:
            ProgramError: if there is none.
        """
        found = tuple(edge for edge in self.edges if edge.between == between)
        if not found:
            raise ProgramError(f"the program has no edge {between!r}")
        return found

    def unroll(self, samples: int) -> tuple[tuple[Instruction, ...], ...]:
        """Per device the instructions for a stream of ``samples`` samples, numbered absolutely.

        They name the very ring. What is for samples beyond the end of the stream is left out; so
        the last turns of a body that computes ahead are its drain.
        """
        rings: defaultdict[str, list[Edge]] = defaultdict(list)
        for edge in self.edges:
            rings[edge.between].append(edge)

        def at(step: Instruction, sample: int) -> Instruction:
            name = next((ring.name for ring in rings[step.edge] if ring.carries(sample)), step.edge)
            return Instruction(step.op, step.stage, sample, name)

        def absolute(program: DeviceProgram) -> tuple[Instruction, ...]:
            body = (
                at(step, sample + step.sample * program.replicas)
                for sample in range(program.replica, samples, program.replicas * program.turn)
                for step in program.body
            )
            once = [[at(step, step.sample) for step in steps] for steps in (program.warm_up, program.drain)]
            everything = (*once[0], *body, *once[1])
            return tuple(step for step in everything if not (program.body and step.sample >= samples))

        return tuple(absolute(program) for program in self.devices)

    def to_json(self) -> dict[str, Any]:
        """As JSON data; instructions in text form."""
        return {
            "schedule": self.schedule,
            "data_parallel": self.data_parallel,
            "devices": [
                {
                    "device": d.device,
                    "stages": list(d.stages),
                    "warm_up": [str(i) for i in d.warm_up],
                    "body": [str(i) for i in d.body],
                    "drain": [str(i) for i in d.drain],
                    "replica": d.replica,
                    "replicas": d.replicas,
                    "turn": d.turn,
                }
                for d in self.devices
            ],
            "edges": [_edge_to_json(edge) for edge in self.edges],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Program:
        """The inverse of :meth:`to_json`."""

        def steps(words: list[str]) -> tuple[Instruction, ...]:
            return tuple(Instruction.parse(word) for word in words)

        return cls(
            tuple(
                DeviceProgram(
                    d["device"],
                    tuple(d["stages"]),
                    steps(d["warm_up"]),
                    steps(d["body"]),
                    steps(d["drain"]),
                    d.get("replica", 0),
                    d.get("replicas", 1),
                    d.get("turn", 1),
                )
                for d in data["devices"]
            ),
            tuple(_edge_from_json(e) for e in data["edges"]),
            data["schedule"],
            data.get("data_parallel", 1),
        )


def spec_from_json(data: dict[str, Any]) -> TensorSpec:
    """A :class:`TensorSpec` from ``vars(spec)`` after a JSON round trip."""
    fields: dict[str, Any] = {**data, "shape": tuple(data["shape"]), "stride": tuple(data["stride"])}
    return TensorSpec(**fields)


def _edge_to_json(edge: Edge) -> dict[str, Any]:
    own = {field.name: getattr(edge, field.name) for field in dataclasses.fields(edge)}
    return {**own, "values": list(edge.values), "specs": [vars(spec) for spec in edge.specs]}


def _edge_from_json(data: dict[str, Any]) -> Edge:
    specs = tuple(spec_from_json(spec) for spec in data["specs"])
    fields: dict[str, Any] = {**data, "values": tuple(data["values"]), "specs": specs}
    return Edge(**fields)


def _end(stage: int, replica: int = 0, replicas: int = 1) -> str:
    return "host" if stage == HOST else f"{stage}.{replica}" if replicas > 1 else str(stage)
