"""Options that steer the planner, the same for every command that plans."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from pipecompile.cli.console import devices_of
from pipecompile.errors import InputError

_GOALS = ("throughput", "latency")

_OPTIONS = (
    click.option(
        "--devices",
        metavar="N|NAMES",
        help="How many cores to spread the model over, or which: cpu:0,cpu:1.  [default: 2]",
    ),
    click.option(
        "--cluster",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A YAML file of devices, their speeds and memory, and links, in place of --devices.",
    ),
    click.option(
        "--pin",
        multiple=True,
        metavar="LAYERS=DEVICE[,DEVICE]",
        help="Layers that must run on a device, or on one of several: 'encoder.*=cpu:0'. Repeatable.",
    ),
    click.option(
        "--colocate",
        multiple=True,
        metavar="LAYERS[,LAYERS]",
        help="Layers that must share a stage: 'encoder.0.*' or embed,head. Repeatable.",
    ),
    click.option(
        "--objective",
        default="throughput",
        show_default=True,
        metavar="GOAL[:SECONDS]",
        help="throughput or latency; throughput:0.02 keeps the latency under 20 ms, latency:0.02 the time between "
        "samples.",
    ),
    click.option(
        "--memory",
        multiple=True,
        metavar="[DEVICE=]SIZE",
        help="The memory of each device, '2GiB', or of one, cpu:0=512MiB. Repeatable.",
    ),
)


def planning_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options. It gets them as ``planning``, keywords of ``compile()``."""

    @functools.wraps(command)
    def collect(
        devices: str | None,
        cluster: Path | None,
        pin: tuple[str, ...],
        colocate: tuple[str, ...],
        objective: str,
        memory: tuple[str, ...],
        **others: Any,
    ) -> None:
        if devices is not None and cluster is not None:
            raise InputError("--devices and --cluster both say which devices there are: give one of them")
        planning: dict[str, Any] = {
            "devices": devices_of(devices or "2") if cluster is None else _cluster(cluster),
            "pin": _pins(pin),
            "colocate": [_names(text, "--colocate", "name layers with commas between them") for text in colocate],
            "objective": _objective(objective),
            "memory": _memory(memory),
        }
        command(planning=planning, **others)

    for option in reversed(_OPTIONS):
        collect = option(collect)
    return collect


def _cluster(path: Path) -> Any:
    from pipecompile.ir.cluster import Cluster

    return Cluster.load(path)


def _names(text: str, option: str, what: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"{option} {text}: {what}")
    return names


def _pins(texts: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        layers, _, devices = (part.strip() for part in text.rpartition("="))
        if not layers:
            raise InputError(f"--pin {text}: write LAYERS=DEVICE, such as 'encoder.*=cpu:0'")
        if layers in found:
            raise InputError(f"--pin {layers}=... is given twice: write the devices it may run on with commas")
        found[layers] = _names(devices, "--pin", "name the device after the =, such as cpu:0")
    return found


def _objective(text: str) -> str | tuple[str, float]:
    goal, colon, limit = text.partition(":")
    if goal not in _GOALS:
        raise InputError(f"--objective {text}: it is {' or '.join(_GOALS)}, with :SECONDS for a limit on the other")
    if not colon:
        return goal
    try:
        seconds = float(limit)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"--objective {text}: the limit is a number of seconds above 0, such as {goal}:0.02")
    return goal, seconds


def _memory(texts: Iterable[str]) -> str | dict[str, str] | None:
    named: dict[str, str] = {}
    for_all: str | None = None
    for text in texts:
        device, _, size = (part.strip() for part in text.rpartition("="))
        if device:
            named[device] = size
        elif for_all is None:
            for_all = size
        else:
            raise InputError(f"--memory is given twice for all devices: {for_all} and {size}")
    if named and for_all is not None:
        raise InputError(
            f"--memory {for_all} is for all devices, {', '.join(named)} for some: name every device, or none"
        )
    return named or for_all


__all__ = ["planning_options"]
