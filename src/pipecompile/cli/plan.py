"""``pipecompile plan``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from pipecompile.cli.compile import FACTORY_HELP, ahead_option, input_option
from pipecompile.cli.console import ms, out, print_plan, progress
from pipecompile.cli.planning import planning_options

if TYPE_CHECKING:
    from pipecompile.alternatives import Alternatives

_HELP = f"""Say what compiling a model would decide, and what it would bring, beside every alternative.

{FACTORY_HELP}

The model is traced and timed as by `compile`, and cut for one device, two, and so on up to
--devices, and with copies of stages where that may be faster. Each cut is
measured stage by stage and simulated. Nothing is written. A number of devices with which pins or
memory cannot be met is left out, and that is said.

\b
Examples:
  pipecompile plan mynet:Net --input 1x3x224x224
  pipecompile plan mynet:Net --input 1x3x224x224 --devices 4 --json
  pipecompile plan mynet:Net --input 1x3x224x224 --cluster lab.yaml --pin 'head=cpu:1'
"""


@click.command("plan", help=_HELP, short_help="Say what compiling would decide, beside every alternative.")
@click.argument("factory")
@input_option
@planning_options
@ahead_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan_command(
    factory: str, inputs: tuple[str, ...], planning: dict[str, Any], ahead: int | None, as_json: bool
) -> None:
    """See ``_HELP``."""
    from pipecompile.cli.factory import draw, load_factory, parse

    wanted = [parse(text) for text in inputs]
    model = load_factory(factory)
    args, kwargs = draw(wanted)
    from pipecompile.alternatives import alternatives

    with progress() as tell:
        found = alternatives(model, args, kwargs, ahead=ahead, progress=tell, **planning)
    if as_json:
        click.echo(json.dumps(_data(found), indent=1))
        return
    _print(found)


def _print(found: Alternatives) -> None:
    from rich.table import Table

    table = Table(header_style="bold")
    headings = ("", "samples/s", "of the model", "latency ms", "under load ms", "balance", "layers a stage")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "layers a stage") else "right")
    table.add_row("the model itself", f"{1 / found.eager:,.1f}", "1.00x", ms(found.eager), ms(found.eager), "", "")
    best = found.best
    for each in found.each:
        table.add_row(
            each.plan.shape,
            f"{each.throughput:,.1f}",
            f"{each.throughput * found.eager:.2f}x",
            ms(each.latency),
            ms(each.loaded_latency),
            f"{each.plan.balance:.2f}",
            " + ".join(str(len(stage.layers)) for stage in each.plan.stages),
            style="bold" if each is best else None,
        )
    out().print(table)
    for devices, why in found.refused.items():
        click.echo(f"not with {devices} device{'s' * (devices > 1)}: {why}")
    click.echo(found.advice)
    click.echo(f"\nThe plan for {found.each[-1].plan.shape}:")
    print_plan(found.each[-1].plan)
    for note in found.each[-1].plan.notes:
        click.echo(f"note: {note}")


def _data(found: Alternatives) -> dict[str, Any]:
    return {
        "model": found.model,
        "eager_seconds": found.eager,
        "advice": found.advice,
        "refused": {str(devices): why for devices, why in found.refused.items()},
        "best_stages": len(found.best.plan.stages) if found.best is not None else 0,
        "alternatives": [
            {
                "stages": len(each.plan.stages),
                "devices": len(each.plan.loads),
                "samples_per_second": each.throughput,
                "latency_seconds": each.latency,
                "latency_under_load_seconds": each.loaded_latency,
                "balance": each.plan.balance,
                "plan": each.plan.to_json(),
            }
            for each in found.each
        ],
    }
