"""A timeline as a small table of text: which stage computes which sample in which tick."""

from __future__ import annotations

import math
from collections import defaultdict

from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.simulate.run import simulate


def clock_table(timeline: Timeline, tick: float | None = None) -> str:
    """One row a stage, one column a tick, in each cell the sample computed in the middle of the tick.

    A stage with replicas has a row for each. ``tick`` is in seconds; None takes the longest forward, so
    that each sample fills about one cell of the slowest stage, and a much faster stage may miss some.
    A dot is a tick in which the stage does not compute.
    """
    forwards = [event for event in timeline.events if event.activity == "F"]
    seconds = tick or max((event.end - event.start for event in forwards), default=0.0)
    if not seconds:
        return "(nothing is computed)"
    rows: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    columns = 0
    for event in forwards:
        row = rows[event.stage, event.device]
        # The ticks whose middle lies in [start, end), up to rounding.
        first, last = (math.ceil(time / seconds - 0.5 - 1e-9) for time in (event.start, event.end))
        row.update(dict.fromkeys(range(first, last), event.sample))
        columns = max(columns, last)
    width = max(len(str(number)) for number in (columns, *(event.sample for event in forwards))) + 1
    several = len(rows) > len({stage for stage, _ in rows})
    names = {(s, d): f"stage {s}, device {d}" if several else f"stage {s}" for s, d in rows}
    label = max(map(len, names.values()))
    lines = ["tick".ljust(label) + " " + "".join(str(column).rjust(width) for column in range(columns))]
    for place, row in sorted(rows.items()):
        cells = "".join(str(row.get(column, ".")).rjust(width) for column in range(columns))
        lines.append(names[place].ljust(label) + " " + cells)
    return "\n".join(lines)


def ticks(program: Program, samples: int) -> Timeline:
    """The timeline of a program whose forwards all take one second and whose messages take none.

    ``clock_table(ticks(program, samples))`` draws a schedule as such, whatever its model costs.
    """
    count = 1 + max((stage for device in program.devices for stage in device.stages), default=-1)
    owner = {stage: device.device for device in program.devices for stage in device.stages}
    stages = tuple(Stage(stage, owner.get(stage, stage), (), 1.0) for stage in range(count))
    names = range(1 + max(owner.values(), default=-1))
    cluster = Cluster(tuple(Device(f"device:{i}") for i in names))
    free = Link(0.0, float("inf"))
    return simulate(program, Plan(stages, cluster, 1.0, 1.0, "none", 0.0, float(count)), free, samples)


__all__ = ["clock_table", "ticks"]
