"""What training adds to a compiled model: costs of a stage by kind of work, gradients, owners of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.package import Package
from pipecompile.ir.program import Edge, Instruction, Op, Program


@dataclass(frozen=True)
class Gradients:
    """What of a model has gradients: values by name, and the weights that are trained with their layout."""

    values: frozenset[str]
    weights: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class StepPackage:
    """A model compiled for training: ``package`` describes one micro-batch, ``owned`` who updates which weight.

    ``owned`` maps a stage to the placeholder names of the weights it updates; a weight used by
    several stages belongs to the first. ``batched`` says which inputs are split along dimension 0.
    ``batch`` is the number of samples of a batch; with ``smaller`` the largest.
    """

    package: Package
    owned: Mapping[int, tuple[str, ...]]
    batched: tuple[bool, ...]
    batch: int
    smaller: bool = False

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step has; that of a smaller batch may have fewer."""
        return self.package.program.micro_batches * self.package.program.data_parallel

    @property
    def sizes(self) -> tuple[int, int]:
        """The least and the most samples a micro-batch may have."""
        most = max(spec.shape[0] for spec, cut in zip(self.package.inputs, self.batched, strict=True) if cut)
        return max([s.low for s in self.package.symbols.values() if s.dim == 0], default=most), most


@dataclass(frozen=True)
class StepRequest:
    """One training step, as the caller asks for it. ``number`` counts steps, for random masks.

    ``leaves`` and ``targets`` are per micro-batch: the model's flat inputs, and what the loss
    gets. ``weights`` scale the loss of each. Without ``update`` gradients stay for the next step.
    ``clip`` is the largest norm of all gradients together.
    """

    number: int
    leaves: Sequence[Sequence[Any]]
    targets: Sequence[Any]
    weights: Sequence[float]
    update: bool = True
    clip: float | None = None


@dataclass(frozen=True)
class StageCost:
    """Seconds a stage takes for one micro-batch, by kind of work, and the bytes it keeps for the backward.

    ``backward`` is a whole backward at once; ``backward_input`` and ``backward_weight`` the two
    halves of a split one, which together may take longer. ``update`` is once a step. ``kept`` is
    the memory in bytes from F to W of one micro-batch; ``stash`` is the part of it that came in,
    which a stage keeps that recomputes the rest.
    """

    forward: float
    backward_input: float
    backward_weight: float
    backward: float
    update: float = 0.0
    kept: int = 0
    stash: int = 0

    def of(self, op: Op) -> float:
        """The seconds of one instruction; messages cost what their link says."""
        seconds = {
            Op.FORWARD: self.forward,
            Op.RECOMPUTE: self.forward,
            Op.BACKWARD_INPUT: self.backward_input,
            Op.BACKWARD_WEIGHT: self.backward_weight,
            Op.BACKWARD: self.backward,
            Op.STEP: self.update,
        }
        return seconds.get(op, 0.0)

    def slowed(self, factor: float) -> StageCost:
        """The same work, of which each piece takes ``factor`` times as long."""
        return replace(
            self,
            forward=self.forward * factor,
            backward_input=self.backward_input * factor,
            backward_weight=self.backward_weight * factor,
            backward=self.backward * factor,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return dict(vars(self))


#: What every generated training module defines, word for word; a saved one must not say anything else there.
HELPERS = '''grad = torch.autograd.grad


def edge_of(value):
    """Where the gradient of a value arrives; None in a forward that records none."""
    return torch.autograd.graph.get_gradient_edge(value) if torch.is_grad_enabled() else None


def filled(gradient, value):
    """The gradient of a value, zero where nothing depends on it."""
    return torch.zeros_like(value) if gradient is None else gradient


def held(value):
    """A value to keep when the slot of the message it may lie in is used again."""
    slot = isinstance(value, torch.Tensor) and not value.untyped_storage().resizable()
    return value.clone() if slot else value
'''

#: One tick for each of F, B and W: what the papers on schedules count in.
UNIT = StageCost(1.0, 1.0, 1.0, 2.0)


def chain_edges(program: Program) -> tuple[Edge, ...]:
    """Edges that say what a compute-only program implies: each stage needs its neighbours; nothing travels."""
    count = 1 + max((stage for device in program.devices for stage in device.stages), default=-1)
    forward = [Edge(stage, stage + 1, (), (), 0, 0) for stage in range(count - 1)]
    return (*forward, *(Edge(edge.target, edge.source, (), (), 0, 0) for edge in forward))


def kept_at_once(
    program: Program, sizes: Sequence[float] | None = None, stashes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Per device the most that is kept at any time: activations of micro-batches between F and W.

    ``sizes`` gives the weight of one micro-batch in each stage, 1 by default; ``stashes`` the part
    of it that is kept where it is recomputed, 0 by default.
    """
    again = {step.stage for device in program.devices for step in device.warm_up if step.op is Op.RECOMPUTE}
    peaks: list[float] = []
    for device in program.devices:
        held = peak = 0.0
        for step in device.warm_up:
            size = 1.0 if sizes is None else sizes[step.stage]
            stash = 0.0 if stashes is None else stashes[step.stage]
            if step.op is Op.FORWARD:
                held += stash if step.stage in again else size
            elif step.op is Op.RECOMPUTE:
                held += size - stash
            elif step.op in (Op.BACKWARD_WEIGHT, Op.BACKWARD):
                held -= size
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def waiting_at_once(program: Program) -> tuple[int, ...]:
    """Per device the bytes of activations that may lie in its rings and are of no micro-batch it has begun.

    These are slots beyond what :func:`kept_at_once` counts: for messages ahead, and for all that come while a
    recomputed stage waits for its backward.
    """
    found: list[int] = []
    for device in program.devices:
        begun, most = dict.fromkeys(device.stages, 0), dict.fromkeys(device.stages, 0)
        for step in device.warm_up:
            begun[step.stage] += step.op is Op.FORWARD
            most[step.stage] = max(most[step.stage], begun[step.stage])
            begun[step.stage] -= step.op in (Op.BACKWARD_WEIGHT, Op.BACKWARD)
        into = [edge for edge in program.edges if edge.forward and edge.target in most]
        found.append(sum(max(edge.slots - most[edge.target], 0) * edge.nbytes for edge in into))
    return tuple(found)


def of_parts(program: Program, parts: int) -> Program:
    """What of a step's program is carried out for a batch of only so many micro-batches, the first ones."""
    tied = {edge.name for edge in program.edges if edge.tied}

    def happens(step: Instruction) -> bool:
        always = step.op is Op.STEP or step.edge in tied
        return always or program.deal(step.stage).number(step.sample) < parts

    devices = (replace(device, warm_up=tuple(filter(happens, device.warm_up))) for device in program.devices)
    return replace(program, devices=tuple(devices))


__all__ = [
    "HELPERS",
    "UNIT",
    "Gradients",
    "StageCost",
    "StepPackage",
    "StepRequest",
    "chain_edges",
    "kept_at_once",
    "of_parts",
    "waiting_at_once",
]
