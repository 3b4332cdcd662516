"""What users mean by devices=: a count, names, or a Cluster of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipecompile.errors import PlanError, warn
from pipecompile.ir.cluster import Cluster, Device


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
    found: list[Device] = []
    for name in map(str, devices):
        kind, _, index = name.partition(":")
        if kind != "cpu" or not index.isdigit():
            raise PlanError(f"unknown device {name!r}: this version knows 'cpu:<number>'")
        if int(index) >= len(cores):
            raise PlanError(f"there is no device {name!r}: this process may use {len(cores)} cores (cpu:0 and up)")
        found.append(Device(name, core=cores[int(index)]))
    if not found:
        raise PlanError("devices is empty: at least one device is needed")
    if len(set(found)) < len(found):
        raise PlanError(f"devices={list(devices)!r} names a device twice: give each core one stage, or a count")
    return Cluster(tuple(found))


def check_runs_here(cluster: Cluster) -> None:
    """Refuse devices this version can plan for, but not run; say which cores are not to be had.

    Raises:
        PlanError: naming a device that is no CPU core.
    """
    cores = sorted(os.sched_getaffinity(0))
    for device in cluster.devices:
        if device.kind != "cpu":
            raise PlanError(
                f"device {device.name!r} is of kind {device.kind!r}: this version runs on CPU cores only (kind 'cpu'); "
                "`pipecompile plan` and the Partition pass plan for other kinds"
            )
    missing = [device for device in cluster.devices if device.core is not None and device.core not in cores]
    if missing:
        warn(
            f"this process may use the cores {', '.join(map(str, cores))}, not "
            f"{', '.join(f'{device.core} of {device.name}' for device in missing)}: run here, such a device takes any",
        )


def _checked(cluster: Cluster) -> Cluster:
    """A Cluster somebody made by hand: with devices, and nothing else, in it."""
    if not cluster.devices:
        raise PlanError("this Cluster has no devices: at least one is needed")
    for device in cluster.devices:
        if not isinstance(device, Device):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"a Cluster is made of Devices, not of {device!r}: write Device({str(device)!r})")
    return cluster
