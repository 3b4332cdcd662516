"""The ``pipecompile`` command: compile a model into a folder, run such a folder.

Nothing here imports torch before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipecompile.errors import InputError, PipecompileError, PipecompileWarning

if TYPE_CHECKING:
    from pipecompile.ir.plan import Plan

_COMPILE_HELP = """Compile a model ahead of time and write it to a folder.

FACTORY is MODULE:NAME, where NAME is a torch.nn.Module class, a function that returns a module, or
a module. MODULE is importable from the current directory or a path to a .py file.

\b
Examples:
  pipecompile compile mynet:Net --input 1x3x224x224 -o net.pipe
  pipecompile compile nets/tiny.py:make --input 1x3x64x64:bfloat16 --devices 3
  pipecompile compile text:Encoder --input ids=1x128:int64 --input mask=1x128:bool
"""

_RUN_HELP = """Stream inputs through a compiled folder and say how fast that went.

\b
--input is one of
  frames.npy   an array: its first axis counts the samples; each becomes one call, given
               the shape the model was compiled for
  video.mp4    any file PyAV reads: frames resized to the model's height and width, RGB,
               0 to 1 (needs pipecompile[video])
  random:N     N samples of the compiled shapes, drawn with a fixed seed

\b
Examples:
  pipecompile run net.pipe --input random:200
  pipecompile run net.pipe --input clip.mp4 --output scores.npy
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pipecompile", prog_name="pipecompile")
def cli() -> None:
    """Turn a PyTorch model into a pipeline that runs on several cores at once."""


@cli.command("compile", help=_COMPILE_HELP)
@click.argument("factory")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="[NAME=]SHAPE[:DTYPE]",
    help="One input, such as 1x3x224x224 or ids=1x16:int64; repeat for several. Default dtype: float32.",
)
@click.option("--devices", default=2, show_default=True, help="How many cores to spread the model over.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The folder to write.  [default: NAME.pipe]")
@click.option("--ahead", type=int, help="Messages a stage receives ahead of its work.  [default: chosen]")
@click.option("--name", help="Name the folder NAME.pipe when --output is not given.  [default: the factory's name]")
def compile_command(
    factory: str, inputs: tuple[str, ...], devices: int, output: Path | None, ahead: int | None, name: str | None
) -> None:
    """See ``_COMPILE_HELP``."""
    from pipecompile import inputs as samples

    wanted = [samples.parse(text) for text in inputs]
    model = samples.load_factory(factory)
    example = samples.draw(wanted)
    target = output or Path(f"{name or factory.rpartition(':')[2].rpartition('.')[2]}.pipe")
    import pipecompile

    with _progress() as tell:
        pipe = pipecompile.compile(
            model, example_inputs=example[0], example_kwargs=example[1], devices=devices, ahead=ahead, progress=tell
        )
    with pipe:
        written = pipe.save(target)
        _print_plan(pipe.plan)
    click.echo(f"wrote {written}")


@cli.command("run", help=_RUN_HELP)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, metavar="FILE|random:N", help="Where samples come from.")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Write results to a .npy file.")
@click.option("--inline", is_flag=True, help="Run all stages in this process (slow; for debugging).")
@click.option("--trust", is_flag=True, help="Allow code with custom operators: only for folders you made yourself.")
def run_command(folder: Path, source: str, output: Path | None, inline: bool, trust: bool) -> None:
    """See ``_RUN_HELP``."""
    import time

    import pipecompile
    from pipecompile import inputs as samples

    if output is not None and output.suffix != ".npy":
        raise InputError(f"--output {output}: only .npy files can be written")
    with pipecompile.load(folder, executor="inline" if inline else "process", trust=trust) as pipe:
        items = samples.open_source(source, pipe.package)
        first = next(items, None)
        if first is None:
            raise InputError(f"--input {source}: there is not a single sample in it")
        list(pipe.stream([first]))  # workers start here, not in what is timed
        pipe.reset_state()
        started: list[float] = []
        latencies: list[float] = []
        kept: list[Any] = []

        def timed() -> Iterator[Any]:
            for item in (first, *items):
                started.append(time.perf_counter())
                yield item

        begin = time.perf_counter()
        for i, result in enumerate(pipe.stream(timed())):
            latencies.append(time.perf_counter() - started[i])
            if output is not None:
                kept.append(samples.first_tensor(result))
        seconds = time.perf_counter() - begin
        _print_run(latencies, seconds, pipe.plan)
    if output is not None:
        click.echo(f"wrote {samples.write(output, kept)}")


def main() -> None:
    """Entry point: errors of ours become one red line and exit status 1."""
    warnings.showwarning = _show_warning
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PipecompileError as error:
        _fail(str(error), 1)


def _fail(text: str, status: int) -> None:
    first, _, rest = text.partition("\n")
    click.secho(f"error: {first}", fg="red", err=True)
    if rest:
        click.echo(rest, err=True)
    sys.exit(status)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    if issubclass(category, PipecompileWarning):
        click.secho(f"note: {message}", fg="yellow", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


@contextmanager
def _progress() -> Generator[Callable[[str, float], None] | None]:
    """A bar on stderr while compiling, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("start", total=1.0)

        def tell(phase: str, fraction: float) -> None:
            bar.update(task, description=phase, completed=fraction)

        yield tell


def _print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=None, header_style="bold")
    for heading in ("stage", "device", "layers", "predicted ms", "measured ms", "transfer ms", "share"):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    total = sum(stage.load for stage in plan.stages)
    for stage in plan.stages:
        table.add_row(
            str(stage.index),
            plan.cluster.devices[stage.device].name,
            str(len(stage.layers)),
            _ms(stage.seconds),
            "-" if stage.measured is None else _ms(stage.measured),
            _ms(stage.transfer),
            f"{stage.load / total:.0%}" if total else "-",
        )
    Console().print(table)
    click.echo(
        f"balance {plan.balance:.2f}, at most {1 / plan.slowest:,.0f} samples/s, {plan.solver}, "
        f"{'optimal' if plan.gap <= 1e-6 else f'within {plan.gap:.1%} of optimal'}"
        if plan.slowest
        else "nothing to balance"
    )


def _print_run(latencies: list[float], seconds: float, plan: Plan) -> None:
    ordered = sorted(latencies)

    def percentile(fraction: float) -> str:
        return _ms(ordered[min(len(ordered) - 1, int(fraction * len(ordered)))])

    rate, stages = len(ordered) / seconds, len(plan.stages)
    click.echo(f"{len(ordered)} samples in {seconds:.2f} s: {rate:,.1f} samples/s on {stages} stages")
    click.echo(
        f"latency, from being read to the result: median {percentile(0.5)} ms, 90% {percentile(0.9)} ms, "
        f"99% {percentile(0.99)} ms, longest {_ms(ordered[-1])} ms"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


if __name__ == "__main__":
    main()
