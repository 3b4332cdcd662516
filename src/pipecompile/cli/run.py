"""``pipecompile run``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipecompile.cli.console import counted, say_error, writable_text
from pipecompile.errors import InputError, PipecompileError

if TYPE_CHECKING:
    from pipecompile.cli.meter import Meter
    from pipecompile.cli.opening import Limited
    from pipecompile.ir.sample import Result
    from pipecompile.pipelines.inference import InferencePipeline

#: Samples that failed are told one by one up to this many.
_TOLD = 3

_HELP = """Stream inputs through a compiled folder and say how fast that went.

\b
--input is one of
  random:N     N samples of the compiled shapes, the same every time
  frames.npy   an array: its first axis counts the samples; each is given the shape the model
               was compiled for, as long as that keeps the order of its axes
  pictures/    a folder of pictures in the order of their names, resized, RGB, 0 to 1
  clip.mp4     any video PyAV reads: frames resized, RGB, 0 to 1
  camera:X     a live source: a device (camera:/dev/video0), a URL (camera:rtsp://...) or a
               named pipe; a URL may stand alone
Pictures, videos and cameras need pipecompile[video].

\b
--output is one of
  scores.npy   the first tensor of each result, along a new first axis
  out.jsonl    a line a result: number, time stamp, latency, and the largest values of each tensor
  -            the same lines on standard output; what is said otherwise goes to standard error

A live source (a camera, or a file with --realtime) does not wait: when the pipeline is busy only
the newest sample is kept. A file waits. --on-overload chooses otherwise.

A sample that fails is reported, and the next one goes on; the exit status is then 1. Ctrl-C ends
the stream after the samples under way, with the summary.

\b
Examples:
  pipecompile run net.pipe --input random:200
  pipecompile run net.pipe --input clip.mp4 --output scores.npy
  pipecompile run net.pipe --input camera:/dev/video0 --output - --top 1
"""


def stream_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that streams."""
    options = [
        click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N samples."),
        click.option("--realtime", is_flag=True, help="Pace a file at its own rate, as a live source."),
        click.option(
            "--rate",
            type=float,
            metavar="R",
            help="Samples a second of arrays, pictures and random:N: for time stamps, and the pace of --realtime.",
        ),
        click.option(
            "--on-overload",
            type=click.Choice(["block", "drop_oldest", "drop_newest", "latest", "error"]),
            help="What to do with samples that come too fast.  [default: latest if live, else block]",
        ),
        click.option("--max-in-flight", type=int, metavar="N", help="Samples inside at a time.  [default: chosen]"),
        click.option("--deadline", type=float, metavar="S", help="Drop samples that wait longer than S seconds."),
        click.option(
            "--on-failure",
            type=click.Choice(["raise", "restart"]),
            default="raise",
            show_default=True,
            help="What to do when a worker dies: end, or replace it and compute its samples again.",
        ),
        click.option("--inline", is_flag=True, help="Run all stages in this process (slow; for debugging)."),
        click.option("--trust", is_flag=True, help="Allow custom operators: only for folders you made yourself."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("run", help=_HELP, short_help="Stream inputs through a compiled folder.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, metavar="SOURCE", help="Where samples come from; see above.")
@click.option("--output", "-o", metavar="FILE|-", help="Where results go; see above.  [default: nowhere]")
@click.option("--top", type=click.IntRange(min=0), default=5, show_default=True, help="Values a tensor; 0: all.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write when each device did what, for chrome://tracing.")
@stream_options
def run_command(folder: Path, source: str, output: str | None, top: int, trace: Path | None, **options: Any) -> int:
    """See ``_HELP``."""
    from pipecompile.cli.meter import live
    from pipecompile.cli.sinks import open_sink

    if trace is not None:
        writable_text(trace)
    with open_sink(output, top) as sink:
        with streaming(folder, source, options) as (pipe, results, meter):
            with live(meter, pipe, quiet=output == "-"):
                trouble = consume(results, meter, sink.write)
            say: Callable[[str], None] = _to_stderr if output == "-" else click.echo
            say(meter.summary(len(pipe.plan.stages)))
            for line in account(pipe, results.source):
                say(line)
            if trace is not None:
                from pipecompile.report.chrome import chrome_trace

                write_text(trace, chrome_trace(pipe.package, pipe.timeline()))
                say(f"wrote {trace}")
        sink.close()
        if output not in (None, "-") and sink.written:
            say(f"wrote {counted(sink.written, 'result')} to {output}")
    if not meter.latencies and not trouble and not results.interrupted:
        raise InputError(f"--input {source}: there is not a single sample in it")
    if results.interrupted:
        say_error("interrupted")
        return 130
    return 1 if trouble else 0


class Results:
    """The stream of a command, and how it is told to end."""

    def __init__(self, stream: Iterable[Result], source: Limited) -> None:
        self._stream, self.source, self.interrupted = iter(stream), source, False

    def __iter__(self) -> Iterator[Result]:
        return self._stream

    def interrupt(self) -> None:
        """End after the samples under way."""
        self.interrupted = True
        self.source.stop()


@contextmanager
def streaming(
    folder: Path, source: str, options: dict[str, Any]
) -> Generator[tuple[InferencePipeline, Results, Meter]]:
    """Load, open and stream, until the end or Ctrl-C."""
    from pipecompile.runtime import nursery

    if not options["inline"] and folder.is_dir():
        nursery.prepare()  # it imports torch while this process does the same

    import pipecompile
    from pipecompile.cli.meter import Meter
    from pipecompile.cli.opening import Limited, open_source

    pipe = pipecompile.load(
        folder,
        executor="inline" if options["inline"] else "process",
        trust=options["trust"],
        on_failure=options["on_failure"],
    )
    with pipe, open_source(source, pipe.package, realtime=options["realtime"], rate=options["rate"]) as opened:
        limited = Limited(opened, options["count"])
        given = {name: options[name] for name in ("on_overload", "max_in_flight", "deadline")}
        with pipe.stream(limited, records=True, **given) as stream:
            results, meter = Results(stream, limited), Meter()
            with _ctrl_c(results):
                yield pipe, results, meter


def consume(results: Results, meter: Meter, take: Callable[[Result], None]) -> int:
    """Take every result; how many samples failed. An error of a sample is told, and the next one goes on.

    What ``take`` raises ends the stream early; it is told, too.
    """
    trouble = 0
    iterator = iter(results)
    while True:
        try:
            result = next(iterator)
        except StopIteration:
            break
        except PipecompileError as error:
            trouble += 1
            if trouble <= _TOLD:
                say_error(str(error))
            continue
        meter.add(result.record)
        try:
            take(result)
        except InputError as error:
            say_error(str(error))
            return trouble + 1
    if trouble > _TOLD:
        say_error(f"and {trouble - _TOLD} more")
    return trouble


def account(pipe: InferencePipeline, source: Limited) -> Iterator[str]:
    """Where the samples went that gave no result."""
    counts = pipe.counts
    if counts.dropped or counts.failed:
        yield (
            f"{counts.submitted} submitted: {counts.delivered} delivered, {counts.dropped} dropped, "
            f"{counts.failed} failed"
        )
    if source.skipped:
        yield f"{source.skipped} more frames passed before the pipeline could take them"


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        InputError: if that fails.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def _ctrl_c(results: Results) -> Generator[None]:
    """The first Ctrl-C ends the stream in order; a second one at once."""

    def handle(_signal: int, _frame: Any) -> None:
        if results.interrupted:
            raise KeyboardInterrupt
        results.interrupted = True
        # Not here: this interrupts whatever holds the locks that ending the source needs.
        threading.Thread(target=results.interrupt, daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
