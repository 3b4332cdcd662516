"""What users mean by devices=: a count, names, or a Cluster of their own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from pipecompile.errors import PipecompileWarning, PlanError
from pipecompile.ir.cluster import Cluster, Device


def make_cluster(devices: int | Sequence[str] | Cluster) -> Cluster:
    """The Cluster meant by ``devices``.

    Raises:
        PlanError: for a count below one, an unknown kind of device or a core this process may not use.
    """
    if isinstance(devices, Cluster):
        return devices
    if isinstance(devices, str):
        devices = [devices]
    if not isinstance(devices, (int, Sequence)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"devices={devices!r}: give a count, a list of names such as 'cpu:0', or a Cluster")
    cores = sorted(os.sched_getaffinity(0))
    if isinstance(devices, int):
        if devices < 1:
            raise PlanError(f"devices={devices}: at least one device is needed")
        if devices > len(cores):
            warnings.warn(
                f"{devices} devices on {len(cores)} cores: some share a core, so the pipeline cannot be faster "
                f"than with {len(cores)}",
                PipecompileWarning,
                stacklevel=3,
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
