"""A report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.ir.package import Package
from pipecompile.ir.timeline import Timeline
from pipecompile.report.gantt import gantt, window
from pipecompile.report.page import render
from pipecompile.report.summary import Cost, Summary, summarise


@dataclass(frozen=True)
class LoadBar:
    """One bar of the chart of loads: label, shares of the chart's width, and the numbers behind them."""

    stage: int
    origin: str
    compute: float
    send: float
    wait: float
    cost: Cost


def html(package: Package, predicted: Timeline, measured: Timeline | None = None) -> str:
    """The page."""
    summary = summarise(package, predicted, measured)
    devices = tuple(device.name for device in package.plan.cluster.devices[: len(package.modules)])
    places = [window(timeline) for timeline in (predicted, measured) if timeline is not None]
    span = max((length for _, length in places), default=0.0)
    charts = [
        gantt(timeline, devices, begin, span)
        for timeline, (begin, _) in zip((t for t in (predicted, measured) if t is not None), places, strict=True)
        if span
    ]
    return render(
        "report.html.j2",
        summary=summary,
        charts=charts,
        loads=load_bars(summary),
        longest=max((bar.cost.period for bar in load_bars(summary)), default=0.0),
        program=package.program,
        inputs=list(zip(package.input_names, package.inputs, strict=True)),
    )


def load_bars(summary: Summary) -> list[LoadBar]:
    """A bar a stage and origin, on one scale."""
    pairs = [
        (stage.index, origin, cost)
        for stage in summary.stages
        for origin, cost in (("predicted", stage.predicted), ("measured", stage.measured))
        if cost is not None
    ]
    longest = max((cost.period for _, _, cost in pairs), default=0.0) or 1.0
    return [
        LoadBar(stage, origin, cost.compute / longest, cost.send / longest, cost.wait / longest, cost)
        for stage, origin, cost in pairs
    ]
