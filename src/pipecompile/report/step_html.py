"""The report of a training pipeline: one step, predicted beside measured, as an HTML page that needs nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipecompile.ir.package import Package
from pipecompile.ir.program import COMPUTE, HOST, Op, Program
from pipecompile.ir.timeline import Event, Timeline
from pipecompile.ir.training import StageCost, kept_at_once, waiting_at_once
from pipecompile.report.gantt import gantt
from pipecompile.report.page import render

#: What a device may do with a micro-batch, and the update, in words; each has a colour.
WORK = {
    "F": "forward",
    "R": "forward again",
    "B": "backward, inputs",
    "W": "backward, weights",
    "BW": "backward",
    "STEP": "update",
}


@dataclass(frozen=True)
class Piece:
    """One kind of a stage's work: mean seconds of one micro-batch (or of the update), predicted and measured."""

    name: str
    predicted: float
    measured: float | None


@dataclass(frozen=True)
class StepStage:
    """One stage. ``slowed`` is by what factor it takes longer beside the others than alone, where measured."""

    index: int
    device: str
    layers: tuple[str, ...]
    pieces: tuple[Piece, ...]
    slowed: float | None
    kept: int


@dataclass(frozen=True)
class StepSummary:
    """A step as a whole: ``seconds`` it takes, of which devices wait the share ``bubble`` on average."""

    seconds: float
    work: float
    bubble: float

    @classmethod
    def of(cls, timeline: Timeline, devices: int) -> StepSummary:
        """The numbers of a timeline of one step."""
        work = sum(e.end - e.start for e in timeline.events if e.activity in WORK)
        seconds = timeline.finishes[0] if timeline.finishes else 0.0
        return cls(seconds, work, 1.0 - work / (devices * seconds) if seconds else 0.0)


def step_html(
    package: Package, predicted: Timeline, costs: Sequence[StageCost], measured: Timeline | None = None
) -> str:
    """The page. ``costs`` are those of the stages for one micro-batch; both timelines are of one step."""
    plan, program = package.plan, package.program
    devices = tuple(device.name for device in plan.cluster.devices[: len(package.modules)])
    shown = [_numbered(timeline, program) for timeline in (predicted, measured) if timeline is not None]
    span = max((timeline.finishes[0] for timeline in shown if timeline.finishes), default=0.0)
    sizes, stashes = [cost.kept for cost in costs], [cost.stash for cost in costs]
    held = zip(kept_at_once(program, sizes, stashes), waiting_at_once(program), strict=True)
    return render(
        "step_report.html.j2",
        model=package.model,
        program=program,
        shape=plan.shape,
        micro_batches=program.micro_batches * program.data_parallel,
        devices=list(zip(plan.cluster.devices, [int(own + waiting) for own, waiting in held], strict=False)),
        predicted=StepSummary.of(predicted, len(devices)),
        measured=None if measured is None else StepSummary.of(measured, len(devices)),
        charts=[gantt(timeline, devices, 0.0, span) for timeline in shown] if span else [],
        several=any(len(device.stages) > 1 for device in program.devices),
        words={op: word for op, word in WORK.items() if any(e.activity == op for t in shown for e in t.events)},
        stages=_stages(package, predicted, measured, costs),
        edges=[edge for edge in program.edges if edge.slots],
        host=HOST,
        notes=plan.notes,
    )


def _numbered(timeline: Timeline, program: Program) -> Timeline:
    """With the step's own numbers of micro-batches, where data-parallel pipelines count theirs from 0."""

    def number(event: Event) -> int:
        once = event.activity == Op.STEP or event.edge.endswith(":tied")
        return event.sample if once else program.deal(event.stage).number(event.sample)

    return replace(timeline, events=tuple(replace(event, sample=number(event)) for event in timeline.events))


def _stages(
    package: Package, predicted: Timeline, measured: Timeline | None, costs: Sequence[StageCost]
) -> list[StepStage]:
    plan, names = package.plan, package.plan.layer_names
    expected, seen = _means(predicted), {} if measured is None else _means(measured)
    found: list[StepStage] = []
    for stage, cost in zip(plan.stages, costs, strict=True):
        pieces = [
            Piece(op, expected.get((stage.index, op), 0.0), seen.get((stage.index, op)))
            for op in WORK
            if (stage.index, op) in expected or (stage.index, op) in seen
        ]
        slowed = stage.measured / stage.alone if stage.measured and stage.alone else None
        layers = tuple(names[i] if i < len(names) else str(i) for i in stage.layers)
        device = plan.cluster.devices[stage.device].name
        found.append(StepStage(stage.index, device, layers, tuple(pieces), slowed, cost.kept))
    return found


def _means(timeline: Timeline) -> dict[tuple[int, str], float]:
    """Stage and kind of work -> mean seconds."""
    seconds: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for event in timeline.events:
        if event.activity in COMPUTE or event.activity == Op.STEP:
            seconds[event.stage, event.activity].append(event.end - event.start)
    return {key: sum(values) / len(values) for key, values in seconds.items()}


__all__ = ["step_html"]
