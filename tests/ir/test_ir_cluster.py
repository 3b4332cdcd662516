"""Cluster files: what they mean, and errors that name the line and the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.cluster_file import parse_bytes, read_cluster

GOOD = """\
devices:
  - name: cpu:0
    memory: 2 GiB
  - {name: "cpu:1", speed: 0.5, threads: 2}
  - {name: big, kind: cuda, memory: 8e9}
link: {latency: 30e-6, bandwidth: 5e9}
links:
  "cpu:0<>big": {latency: 1e-3}
  "big>cpu:1": {bandwidth: 125e6, overlap: 0.5}
"""


def test_a_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(GOOD)
    cluster = Cluster.load(tmp_path / "cluster.yaml")
    assert cluster.devices == (
        Device("cpu:0", "cpu", 0, memory=2 * 2**30),
        Device("cpu:1", "cpu", 1, threads=2, speed=0.5),
        Device("big", "cuda", memory=8e9),
    )
    assert cluster.link == Link(30e-6, 5e9)
    slow = Link(1e-3, 5e9)
    assert cluster.between(0, 2) == cluster.between(2, 0) == slow
    assert cluster.between(2, 1) == Link(30e-6, 125e6, 0.5)
    assert cluster.between(1, 2) == cluster.between(0, 1) == cluster.link
    assert read_cluster(json.dumps({"devices": [{"name": "cpu:0"}]})) == Cluster((Device("cpu:0", core=0),))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("speed: 0.5", "sped: 0.5", r"line 4, devices\[1\]: there is no field 'sped': did you mean 'speed'\?"),
        ("speed: 0.5", "speed: fast", r"line 4, devices\[1\]\.speed: must be a number, not 'fast'"),
        ("speed: 0.5", "speed: -1", r"line 4, devices\[1\]\.speed: -1 is out of range"),
        ("speed: 0.5", "speed: .nan", r"line 4, devices\[1\]\.speed: nan is out of range"),
        ("threads: 2", "threads: 1.5", r"line 4, devices\[1\]\.threads: must be a whole number"),
        ("threads: 2", "threads: [2]", r"line 4, devices\[1\]\.threads: must be a single value"),
        ("2 GiB", "plenty", r"line 3, devices\[0\]\.memory: 'plenty' is not a size in bytes"),
        ("name: big", "name: cpu:0", r"line 5, devices\[2\]\.name: there is a second device 'cpu:0'"),
        ("name: big, ", "", r"line 5, devices\[2\]: the field 'name' is missing"),
        ("30e-6", "-1", r"line 6, link\.latency: -1 is out of range"),
        ("5e9}", "0}", r"line 6, link\.bandwidth: 0 is out of range"),
        ("cpu:0<>big", "cpu:0-big", r"line 8, links: 'cpu:0-big' does not join two of the devices"),
        ("big>cpu:1", "big>cpu:9", r"line 9, links: 'big>cpu:9' does not join two"),
        ("devices:", "device:", r"line 2, the file: there is no field 'device': did you mean 'devices'\?"),
        ("  - name: cpu:0", "  name: cpu:0", r"line 3: not YAML"),
        ("speed: 0.5", "speed: 0.5, speed: 2", r"line 4, devices\[1\]: the field 'speed' is given twice"),
        ("name: big", "name: ''", r"line 5, devices\[2\]\.name: is empty"),
        (GOOD, "", r"the file: must be a mapping"),
        (GOOD, "devices: []", r"line 1, devices: the list is empty"),
        (GOOD, "devices: 3", r"line 1, devices: must be a list"),
        (GOOD, "link: {}", r"line 1, the file: the field 'devices' is missing"),
    ],
)
def test_faults_are_named_with_line_and_field(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(PlanError, match=r"^here.yaml.*" + message):
        read_cluster(GOOD.replace(old, new), "here.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the cluster file .*none.yaml: No such file or directory$"):
        Cluster.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), (2e3, 2000), ("1.5 kB", 1500), ("2 MiB", 2**21), ("3g", 3e9), ("1e6", 1e6)]
)
def test_sizes(text: float | str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1 PB", "0", True, "1 ib"])
def test_no_sizes(text: float | str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)
