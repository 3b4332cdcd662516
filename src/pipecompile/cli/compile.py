"""``pipecompile compile``."""

from __future__ import annotations

from pathlib import Path

import click

from pipecompile.cli.console import devices_of, print_plan, progress, writable_folder

FACTORY_HELP = """FACTORY is MODULE:NAME, where NAME is a torch.nn.Module class, a function that returns a module, or
a module. MODULE is importable from the current directory or a path to a .py file."""

_HELP = f"""Compile a model ahead of time and write it to a folder.

{FACTORY_HELP}

\b
Examples:
  pipecompile compile mynet:Net --input 1x3x224x224 -o net.pipe
  pipecompile compile nets/tiny.py:make --input 1x3x64x64:bfloat16 --devices 3
  pipecompile compile text:Encoder --input ids=1x128:int64 --input mask=1x128:bool
"""

input_option = click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="[NAME=]SHAPE[:DTYPE]",
    help="One input, such as 1x3x224x224 or ids=1x16:int64; repeat for several. Default dtype: float32.",
)
devices_option = click.option(
    "--devices",
    default="2",
    show_default=True,
    metavar="N|NAMES",
    help="How many cores to spread the model over, or which: cpu:0,cpu:1.",
)
ahead_option = click.option("--ahead", type=int, help="Messages a stage receives ahead of its work.  [default: chosen]")


@click.command("compile", help=_HELP)
@click.argument("factory")
@input_option
@devices_option
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The folder to write.  [default: NAME.pipe]")
@ahead_option
@click.option("--replicate", is_flag=True, help="Run copies of stages on several cores where that is faster.")
@click.option("--name", help="Name the folder NAME.pipe when --output is not given.  [default: the factory's name]")
def compile_command(
    factory: str,
    inputs: tuple[str, ...],
    devices: str,
    output: Path | None,
    ahead: int | None,
    replicate: bool,
    name: str | None,
) -> None:
    """See ``_HELP``."""
    target = writable_folder(output or Path(f"{name or factory.rpartition(':')[2].rpartition('.')[2]}.pipe"))
    from pipecompile.cli.factory import draw, load_factory, parse

    wanted = [parse(text) for text in inputs]
    model = load_factory(factory)
    args, kwargs = draw(wanted)
    import pipecompile

    with progress() as tell:
        pipe = pipecompile.compile(
            model,
            example_inputs=args,
            example_kwargs=kwargs,
            devices=devices_of(devices),
            ahead=ahead,
            replicate=replicate,
            progress=tell,
        )
    with pipe:
        written = pipe.save(target)
        print_plan(pipe.plan)
    click.echo(f"wrote {written}")
