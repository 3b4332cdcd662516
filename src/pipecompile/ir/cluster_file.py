"""Clusters as text.

::

    devices:
      - name: cpu:0          # core: 0 follows from the name
        speed: 1.0           # 2.0: twice as fast as the device the profile is taken on
        memory: 2 GiB
      - {name: "cpu:1", speed: 0.5}
    link: {latency: 30e-6, bandwidth: 5e9}     # seconds, bytes per second
    links:
      "cpu:0<>cpu:1": {latency: 1e-3, bandwidth: 125e6}
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device, Link

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: float | str) -> float:
    """A size in bytes: a number, or text such as ``"512 MiB"`` or ``"2e9"``.

    Raises:
        ValueError: if it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    if isinstance(text, bool) or match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size in bytes, such as 2e9 or '512 MiB'")
    size = float(match[1]) * _UNITS[match[2]]
    if not 0 < size < math.inf:
        raise ValueError(f"a size of {text!r} makes no sense")
    return size


def read_cluster(text: str, where: str = "the cluster file") -> Cluster:
    """The Cluster a YAML (or JSON) text describes.

    Raises:
        PlanError: if something in it is wrong, with the line and the field.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise PlanError(f"{where}, line {line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise PlanError(f"{where}: not YAML: {error}") from None
    reader = _Reader(where)
    top = reader.mapping(root, "the file", ("devices", "link", "links"), ("devices",))
    devices: list[Device] = []
    for i, node in enumerate(reader.sequence(top["devices"], "devices")):
        device = reader.device(node, f"devices[{i}]")
        if any(device.name == other.name for other in devices):
            raise reader.error(node, f"devices[{i}].name", f"there is a second device {device.name!r}")
        devices.append(device)
    if not devices:
        raise reader.error(top["devices"], "devices", "the list is empty: at least one device is needed")
    link = reader.link(top["link"], "link", Link()) if "link" in top else Link()
    links: dict[str, Link] = {}
    names = [device.name for device in devices]
    for key, node in reader.pairs(top["links"], "links") if "links" in top else ():
        ends = re.split("<?>", key)
        for end in ends:
            if len(ends) != 2 or end not in names:
                what = f"{key!r} does not join two of the devices {', '.join(names)}: write 'a>b' or 'a<>b'"
                raise reader.error(node, "links", what)
        links[key] = reader.link(node, f"links[{key!r}]", link)
    return Cluster(tuple(devices), link, links)


class _Reader:
    """Takes YAML nodes apart, and knows where they are."""

    def __init__(self, where: str) -> None:
        self.where = where

    def error(self, node: Any, name: str, what: str) -> PlanError:
        line = f", line {node.start_mark.line + 1}" if node is not None else ""
        return PlanError(f"{self.where}{line}, {name}: {what}")

    def pairs(self, node: Any, name: str) -> list[tuple[str, Any]]:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, name, "must be a mapping of names to values")
        return [(str(key.value), value) for key, value in node.value]

    def sequence(self, node: Any, name: str) -> Sequence[Any]:
        import yaml

        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, name, "must be a list")
        return node.value

    def mapping(self, node: Any, name: str, known: Sequence[str], needed: Sequence[str] = ()) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for key, value in self.pairs(node, name):
            if key in found:
                raise self.error(value, name, f"the field {key!r} is given twice")
            found[key] = value
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise self.error(value, name, f"there is no field {key!r}: {hint}")
        for key in needed:
            if key not in found:
                raise self.error(node, name, f"the field {key!r} is missing")
        return found

    def value(self, node: Any, name: str) -> Any:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, name, "must be a single value")
        return yaml.safe_load(yaml.serialize(node))

    def number(self, node: Any, name: str, least: float, most: float = math.inf) -> float:
        given = self.value(node, name)
        try:
            found = float(given)  # YAML 1.1 takes 30e-6 for text
        except (TypeError, ValueError):
            raise self.error(node, name, f"must be a number, not {given!r}") from None
        if isinstance(given, bool) or not least <= found <= most or math.isinf(found):
            raise self.error(node, name, f"{given!r} is out of range ({least:g} to {most:g})")
        return found

    def device(self, node: Any, name: str) -> Device:
        found = self.mapping(node, name, [f.name for f in fields(Device)], ("name",))
        title = str(self.value(found["name"], f"{name}.name"))
        if not title.strip():
            raise self.error(found["name"], f"{name}.name", "is empty: a device has a name, such as cpu:0")
        kind = str(self.value(found["kind"], f"{name}.kind")) if "kind" in found else title.partition(":")[0]
        values: dict[str, Any] = {"name": title, "kind": kind}
        index = title.partition(":")[2]
        if kind == "cpu" and index.isdigit():
            values["core"] = int(index)
        for key in ("core", "threads"):
            if key in found and self.value(found[key], f"{name}.{key}") is not None:
                number = self.number(found[key], f"{name}.{key}", float(key == "threads"))
                if not number.is_integer():
                    raise self.error(found[key], f"{name}.{key}", f"must be a whole number, not {number}")
                values[key] = int(number)
        if "speed" in found:
            values["speed"] = self.number(found["speed"], f"{name}.speed", 1e-9)
        if "memory" in found and (size := self.value(found["memory"], f"{name}.memory")) is not None:
            try:
                values["memory"] = parse_bytes(size)
            except ValueError as error:
                raise self.error(found["memory"], f"{name}.memory", str(error)) from None
        return Device(**values)

    def link(self, node: Any, name: str, default: Link) -> Link:
        found = self.mapping(node, name, [f.name for f in fields(Link)])
        values = dict(vars(default))
        for key, child in found.items():
            least, most = {"latency": (0.0, math.inf), "bandwidth": (1e-9, math.inf), "overlap": (0.0, 1.0)}[key]
            values[key] = self.number(child, f"{name}.{key}", least, most)
        return Link(**values)


__all__ = ["parse_bytes", "read_cluster"]
