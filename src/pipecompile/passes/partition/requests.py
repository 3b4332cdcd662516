"""What users ask for by name (pins, layers to keep together, memory), in terms of a problem."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.cluster_file import parse_bytes
from pipecompile.ir.graph import ModelGraph

#: Bytes, or text such as "2 GiB".
Size = float | str


def find_layers(graph: ModelGraph, pattern: str) -> list[int]:
    """Indices of the layers a pattern means: one layer by its very name, or all whose name or module matches.

    ``*`` and ``?`` match as in file names. A layer's exact name, as plans print it, means that layer
    alone, whatever lies below it; else ``"encoder"`` means the whole module, as ``"encoder.*"`` always does.

    Raises:
        PlanError: if it matches none, with the nearest name.
    """
    exact = [index for index, layer in enumerate(graph.layers) if layer.name == pattern]
    if exact:
        return exact
    module = pattern.removesuffix(".*")
    found = [
        index
        for index, layer in enumerate(graph.layers)
        if fnmatch.fnmatchcase(layer.name, pattern)
        or any(fnmatch.fnmatchcase(layer.module, inside) for inside in (module, f"{module}.*"))
    ]
    if not found:
        known = dict.fromkeys(name for layer in graph.layers for name in (layer.name, layer.module) if name)
        near = difflib.get_close_matches(pattern, known, 1, 0.3)
        hint = f"; the nearest is {near[0]!r}" if near else f"; there are {', '.join(list(known)[:5])} and so on"
        raise PlanError(f"no layer matches {pattern!r}{hint}")
    return found


def find_device(cluster: Cluster, name: str, used: int) -> int:
    """Index of a device by name.

    Raises:
        PlanError: if the cluster has none of this name, or it is not among the first ``used``.
    """
    names = [device.name for device in cluster.devices]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.3)
        hint = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(names)}"
        raise PlanError(f"there is no device {name!r}: {hint}")
    index = names.index(name)
    if index >= used:
        raise PlanError(f"device {name!r} is pinned to, but the plan uses only {', '.join(names[:used])}")
    return index


def pins(
    graph: ModelGraph, cluster: Cluster, pin: Mapping[str, str | Sequence[str]], used: int
) -> dict[int, frozenset[int]]:
    """Devices each pinned layer may run on; several patterns on one layer must agree.

    Raises:
        PlanError: if a name is unknown, or two pins of a layer contradict each other.
    """
    allowed: dict[int, frozenset[int]] = {}
    said: dict[int, str] = {}
    for pattern, wanted in pin.items():
        names: Any = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
            raise PlanError(f"pin {pattern!r}: a device's name or several are needed, not {wanted!r}")
        devices = frozenset(find_device(cluster, name, used) for name in names)
        for layer in find_layers(graph, pattern):
            both = allowed.get(layer, devices) & devices
            if not both:
                raise PlanError(
                    f"contradictory pins: layer {graph.layers[layer].name!r} is pinned by {said[layer]!r} "
                    f"and, to other devices, by {pattern!r}"
                )
            allowed[layer], said[layer] = both, pattern
    return allowed


def with_memory(cluster: Cluster, memory: Size | Mapping[str, Size] | None) -> Cluster:
    """The cluster with the memory of all its devices, or of those named, limited.

    Raises:
        PlanError: if a device is unknown or an amount is no size.
    """
    if memory is None:
        return cluster
    if not isinstance(memory, Mapping):
        memory = {device.name: memory for device in cluster.devices}
    sizes: dict[int, float] = {}
    for name, amount in memory.items():
        try:
            sizes[find_device(cluster, name, len(cluster.devices))] = parse_bytes(amount)
        except ValueError as error:
            raise PlanError(f"memory of {name!r}: {error}") from None
    devices = tuple(replace(device, memory=sizes.get(i, device.memory)) for i, device in enumerate(cluster.devices))
    return replace(cluster, devices=devices)


__all__ = ["Size", "find_device", "find_layers", "pins", "with_memory"]
