"""A report for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipecompile.report.summary import Cost, Flow, Summary, spans
from pipecompile.report.units import nbytes, share, time


def print_summary(summary: Summary, out: Console) -> None:
    """Two tables and a line: stages, transfers, the whole. Predicted and measured side by side, as ``p | m``."""
    measured = summary.measured is not None
    title = (
        f"{summary.model}: {len(summary.stages)} stage{'s' * (len(summary.stages) != 1)}, balance {summary.balance:.2f}"
    )
    both = "predicted | measured" if measured else "predicted"
    stages = Table(title=f"{title} ({both})", title_justify="left", header_style="bold")
    for name in ("stage", "device", "layers", "compute", "send", "wait", "busy"):
        stages.add_column(name, justify="left" if name in ("device", "layers") else "right")
    for stage in summary.stages:
        one, two = stage.predicted, stage.measured
        stages.add_row(
            str(stage.index),
            stage.device,
            f"{len(stage.layers)}: {spans(stage.layers)}",
            _pair(time(one.compute), two and time(two.compute)),
            _pair(time(one.send), two and time(two.send)),
            _pair(time(one.wait), two and time(two.wait)),
            _pair(share(one.busy), two and share(two.busy)),
        )
    out.print(stages)
    edges = Table(title=f"transfers ({both})", title_justify="left", header_style="bold")
    for name in ("from", "to", "bytes a sample", "sent in", "ahead"):
        edges.add_column(name, justify="left" if name in ("from", "to") else "right")
    for edge in summary.edges:
        sent = "by the caller" if edge.source == "caller" else _pair(time(edge.predicted), _time(edge.measured))
        edges.add_row(edge.source, edge.target, nbytes(edge.nbytes), sent, str(edge.ahead))
    out.print(edges)
    out.print(_flow("predicted", summary.predicted), highlight=False)
    if summary.measured is not None:
        out.print(_flow("measured", summary.measured), highlight=False)


def _flow(word: str, flow: Flow) -> str:
    return (
        f"{word:>9}: {flow.throughput:,.1f} samples/s, latency in a full pipeline {time(flow.latency)}, "
        f"99% {time(flow.worst)} ({flow.samples} samples)"
    )


def _pair(predicted: str, measured: str | Cost | None) -> str:
    return predicted if measured is None else f"{predicted} | {measured}"


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else time(seconds)
