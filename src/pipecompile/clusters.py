"""What users mean by devices=: a count, names, or a Cluster of their own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch

from pipecompile.errors import InputError, PlanError, warn
from pipecompile.ir.cluster import Cluster, Device

_CARD = re.compile(r"cuda:\d+")


def make_cluster(devices: int | Sequence[str] | Cluster) -> Cluster:
    """The Cluster meant by ``devices``.

    Raises:
        PlanError: for a count below one, an unknown kind of device or a core this process may not use.
    """
    if isinstance(devices, Cluster):
        return _checked(devices)
    if isinstance(devices, str):
        devices = [devices]
    if not isinstance(devices, (int, Sequence)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"devices={devices!r}: give a count, a list of names such as 'cpu:0', or a Cluster")
    cores = sorted(os.sched_getaffinity(0))
    if isinstance(devices, int):
        if devices < 1:
            raise PlanError(f"devices={devices}: at least one device is needed")
        if devices > len(cores):
            warn(
                f"{devices} devices on {len(cores)} cores: some share a core, so the pipeline cannot be faster "
                f"than with {len(cores)}",
            )
        return Cluster(tuple(Device(f"cpu:{i}", core=cores[i % len(cores)]) for i in range(devices)))
    if devices and all(_CARD.fullmatch(str(name)) for name in devices):
        return _checked_cards(Cluster(tuple(Device(f"{name}/{i}", "cuda") for i, name in enumerate(devices))))
    found: list[Device] = []
    for name in map(str, devices):
        kind, _, index = name.partition(":")
        if kind != "cpu" or not index.isdigit():
            mixed = "; CPU cores and cards do not go together" if _CARD.fullmatch(name) else ""
            raise PlanError(f"unknown device {name!r}: this version knows 'cpu:<number>' and 'cuda:<number>'{mixed}")
        if int(index) >= len(cores):
            raise PlanError(f"there is no device {name!r}: this process may use {len(cores)} cores (cpu:0 and up)")
        found.append(Device(name, core=cores[int(index)]))
    if not found:
        raise PlanError("devices is empty: at least one device is needed")
    if len(set(found)) < len(found):
        raise PlanError(f"devices={list(devices)!r} names a device twice: give each core one stage, or a count")
    return Cluster(tuple(found))


def check_runs_here(cluster: Cluster, mode: str = "infer", executor: str | None = None) -> None:
    """Refuse devices this version can plan for, but not run; say which cores are not to be had.

    Raises:
        PlanError: naming a device that is no CPU core, or no stream of a card where those can be used.
        InputError: if an executor is asked for that devices on a card do not have.
    """
    cores = sorted(os.sched_getaffinity(0))
    if cluster.card is not None and mode == "train":
        _checked_cards(cluster)
        if executor == "process":
            raise InputError(
                f"executor='process' is for CPU cores: devices on {cluster.card} are streams in this process, leave "
                "executor= out"
            )
        return
    for device in cluster.devices:
        if device.kind != "cpu":
            raise PlanError(
                f"device {device.name!r} is of kind {device.kind!r}: mode={mode!r} of this version runs on CPU cores "
                "only (kind 'cpu'), and mode='train' on these or on one card (kind 'cuda'); `pipecompile plan` and the "
                "Partition pass plan for other kinds"
            )
    missing = [device for device in cluster.devices if device.core is not None and device.core not in cores]
    if missing:
        warn(
            f"this process may use the cores {', '.join(map(str, cores))}, not "
            f"{', '.join(f'{device.core} of {device.name}' for device in missing)}: run here, such a device takes any",
        )


def _checked_cards(cluster: Cluster) -> Cluster:
    """Devices that are streams of one card, which is there."""
    for device in cluster.devices:
        if device.kind != "cuda":
            raise PlanError(
                f"device {device.name!r} is of kind {device.kind!r}, {cluster.devices[0].name!r} on a card: a pipeline "
                "runs on CPU cores or on a card, not on both"
            )
        card, _, stream = device.name.partition("/")
        if not _CARD.fullmatch(card) or not stream.isdigit():
            raise PlanError(f"device {device.name!r} is of kind 'cuda': name it 'cuda:<card>/<number>'")
        if card != cluster.card:
            raise PlanError(
                f"devices on {cluster.card} and {card}: this version runs all devices as streams of one card; "
                f"give devices={[cluster.card] * len(cluster.devices)!r}"
            )
    card = str(cluster.card)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(card.partition(":")[2]) >= found:
        there = f"torch sees {found} (cuda:0 and up)" if found else f"torch {torch.__version__} sees no CUDA card here"
        raise PlanError(f"there is no device {card!r}: {there}; CPU cores are devices=<count>")
    return cluster


def _checked(cluster: Cluster) -> Cluster:
    """A Cluster somebody made by hand: with devices, and nothing else, in it."""
    if not cluster.devices:
        raise PlanError("this Cluster has no devices: at least one is needed")
    for device in cluster.devices:
        if not isinstance(device, Device):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"a Cluster is made of Devices, not of {device!r}: write Device({str(device)!r})")
    return cluster
