"""What all commands say, and how: errors, notes, progress, numbers, the table of a plan."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pipecompile.errors import InputError, PipecompileWarning

if TYPE_CHECKING:
    from rich.console import Console

    from pipecompile.ir.plan import Plan


def say_error(text: str) -> None:
    """An error on stderr, its first line in red."""
    first, _, rest = text.partition("\n")
    click.secho(f"error: {first}", fg="red", err=True)
    if rest:
        click.echo(rest, err=True)


def fail(text: str, status: int) -> NoReturn:
    """Say what went wrong and leave."""
    say_error(text)
    sys.exit(status)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """A warning of ours as a note; any other as Python shows it."""
    if issubclass(category, PipecompileWarning):
        click.secho(f"note: {message}", fg="yellow", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


@contextmanager
def progress() -> Generator[Callable[[str, float], None] | None]:
    """A bar on stderr, on a terminal only."""
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


def print_plan(plan: Plan) -> None:
    """The stages, then how good the cut is."""
    from rich.table import Table

    table = Table(title=None, header_style="bold")
    for heading in ("stage", "device", "layers", "predicted ms", "measured ms", "transfer ms", "share"):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    total = sum(stage.load for stage in plan.stages)
    for stage in plan.stages:
        table.add_row(
            str(stage.index),
            ", ".join(plan.cluster.devices[device].name for device in stage.devices),
            str(len(stage.layers)),
            ms(stage.seconds),
            "-" if stage.measured is None else ms(stage.measured),
            ms(stage.transfer),
            f"{stage.load / total:.0%}" if total else "-",
        )
    out().print(table)
    click.echo(
        f"balance {plan.balance:.2f}, at most {1 / plan.slowest:,.0f} samples/s, {plan.solver}, "
        f"{'optimal' if plan.gap <= 1e-6 else f'within {plan.gap:.1%} of optimal'}"
        if plan.slowest
        else "nothing to balance"
    )


def out() -> Console:
    """Standard output for tables; wide enough for them in a pipe, too."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def ms(seconds: float) -> str:
    """Milliseconds with three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def counted(number: int, what: str) -> str:
    """``1 sample``, ``2 samples``."""
    return f"{number} {what}{'s' * (number != 1)}"


def devices_of(text: str) -> int | list[str]:
    """``2``, or names with commas between them."""
    return int(text) if text.lstrip("-").isdigit() else [name.strip() for name in text.split(",")]


def writable_text(path: Path) -> Path:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        InputError: with the reason.
    """
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def writable_folder(path: Path) -> Path:
    """Refuse a folder that cannot be made, before any work is done for it.

    Raises:
        InputError: with the reason.
    """
    if path.exists() and not (path / "manifest.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not a saved pipeline: choose another name or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}") from None
    return path
