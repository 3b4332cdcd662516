"""``pipecompile report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipecompile.cli.console import out, say_error, writable_text
from pipecompile.cli.run import account, consume, stream_options, streaming, write_text
from pipecompile.errors import InputError

if TYPE_CHECKING:
    from pipecompile.ir.package import Package
    from pipecompile.ir.timeline import Timeline

_HELP = """Show where the time of a compiled folder goes: stages, loads, transfers, waits.

Without --input only what the plan predicts. With --input, as for `pipecompile run`, the samples are
streamed and measured, and both are shown beside each other. Results are not kept.

\b
Examples:
  pipecompile report net.pipe
  pipecompile report net.pipe --input random:300 -o report.html
  pipecompile report net.pipe --input clip.mp4 --json --trace trace.json
"""

#: Samples the simulator runs.
_SIMULATED = 64


@click.command("report", help=_HELP, short_help="Show where the time of a compiled folder goes.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--input", "source", metavar="SOURCE", help="Stream this and measure; see `pipecompile run --help`.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write a web page that needs nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON in place of tables.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write when each device did what, for chrome://tracing.")
@stream_options
def report_command(
    folder: Path, source: str | None, output: Path | None, as_json: bool, trace: Path | None, **options: Any
) -> int:
    """See ``_HELP``."""
    for path in (output, trace):
        if path is not None:
            writable_text(path)
    measured: Timeline | None = None
    status = 0
    if source is None:
        import pipecompile

        with pipecompile.load(folder, executor="inline", trust=options["trust"]) as pipe:
            package, predicted = pipe.package, pipe.simulate(_SIMULATED)
    else:
        from pipecompile.cli.meter import live

        with streaming(folder, source, options) as (pipe, results, meter):
            with live(meter, pipe):
                status = min(1, consume(results, meter, lambda _result: None))
            if not meter.latencies:
                raise InputError(f"--input {source}: not a single sample came through, so nothing was measured")
            for line in account(pipe, results.source):
                say_error(line)
            package, predicted, measured = pipe.package, pipe.simulate(_SIMULATED), pipe.timeline()
    _write(package, predicted, measured, output, trace, as_json)
    return status


def _write(
    package: Package,
    predicted: Timeline,
    measured: Timeline | None,
    output: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    from pipecompile.report.summary import summarise

    summary = summarise(package, predicted, measured)
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=1))
    else:
        from pipecompile.report.text import print_summary

        print_summary(summary, out())
    if output is not None:
        from pipecompile.report.html import html

        write_text(output, html(package, predicted, measured))
    if trace is not None:
        from pipecompile.report.chrome import chrome_trace

        write_text(trace, chrome_trace(package, *([predicted] if measured is None else [predicted, measured])))
    for path in (output, trace):
        if path is not None:
            click.echo(f"wrote {path}", err=as_json)
