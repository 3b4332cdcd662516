"""``pipecompile plan`` and ``report``."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_plan_shows_every_number_of_stages_and_says_when_one_device_is_faster(run: Run) -> None:
    status, out, err = run("plan", "nets:make", "--input", "2x12", "--devices", "2")
    assert status == 0, err
    assert "the model itself" in out
    assert "1 stage " in out
    assert "2 stages" in out
    assert "One device is as fast or faster" in out, "a model of some microseconds gains nothing"
    assert "--devices 1" in out


def test_plan_as_json(run: Run) -> None:
    status, out, err = run("plan", "nets:Picture", "--input", "1x3x32x32", "--json")
    assert status == 0, err
    data = json.loads(out)
    shapes = [(each["stages"], each["devices"]) for each in data["alternatives"]]
    assert shapes[:2] == [(1, 1), (2, 2)]
    assert shapes[2:] in ([], [(1, 2)]), "copies where the planner thinks they may be better"
    for each in data["alternatives"]:
        loads = [
            ((stage["seconds"] if stage["measured"] is None else stage["measured"]) + stage["transfer"])
            for stage in each["plan"]["stages"]
        ]
        copies = [1 + len(stage["replicas"]) for stage in each["plan"]["stages"]]
        slowest = max(load / count for load, count in zip(loads, copies, strict=True))
        assert each["samples_per_second"] == pytest.approx(1 / slowest, rel=0.02), "the slowest stage sets the pace"
        assert each["latency_seconds"] >= sum(loads) * 0.98
        assert each["latency_under_load_seconds"] >= each["latency_seconds"] * 0.98
    assert data["best_stages"] in (0, 1, 2)


def test_the_planner_is_steered_by_options(folder: Path, run: Run) -> None:
    (folder / "lab.yaml").write_text('devices: [{name: "cpu:0", memory: 1 MiB}, {name: "cpu:1", speed: 0.5}]')
    options = ("--pin", "0=cpu:1", "--colocate", "1,2", "--objective", "throughput:10", "--memory", "cpu:0=5MB")
    status, out, err = run("plan", "nets:make", "--input", "2x12", "--cluster", "lab.yaml", *options, "--json")
    assert status == 0, err
    data = json.loads(out)
    (found,) = (each["plan"] for each in data["alternatives"] if each["devices"] == 2)
    cluster = found["cluster"]["devices"]
    assert [device["speed"] for device in cluster] == [1.0, 0.5]
    assert [device["memory"] for device in cluster] == [5e6, None]
    placed = {layer: stage["device"] for stage in found["stages"] for layer in stage["layers"]}
    assert found["layer_names"][0] == "0"
    assert (placed[0], placed[1] == placed[2]) == (1, True)
    assert "cpu:1" in data["refused"]["1"], "one device is not enough for the pin, which is said"


def test_a_compiled_folder_follows_the_options(run: Run) -> None:
    words = ("compile", "nets:make", "--input", "2x12", "-o", "net.pipe", "--pin", "0=cpu:0", "--pin", "[1234]=cpu:1")
    status, out, err = run(*words, "--objective", "latency")
    assert status == 0, err
    rows = [line.replace("│", "|").split("|") for line in out.splitlines() if "cpu:" in line]
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [("cpu:0", "1"), ("cpu:1", "4")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pin", "0"], "--pin 0: write LAYERS=DEVICE"),
        (["--pin", "0=cpu:0,"], "name the device after the ="),
        (["--pin", "0=cpu:0", "--pin", "0=cpu:1"], "--pin 0=... is given twice"),
        (["--pin", "9=cpu:0"], "no layer matches '9'"),
        (["--pin", "0=cpu:7"], "there is no device 'cpu:7':"),
        (["--colocate", "0,,1"], "--colocate 0,,1: name layers with commas"),
        (["--objective", "speed"], "--objective speed: it is throughput or latency"),
        (["--objective", "latency:soon"], "a number of seconds above 0"),
        (["--objective", "latency:-1"], "a number of seconds above 0"),
        (["--memory", "1GB", "--memory", "2GB"], "given twice for all devices: 1GB and 2GB"),
        (["--memory", "1GB", "--memory", "cpu:0=2GB"], "--memory 1GB is for all devices, cpu:0 for some"),
        (["--memory", "much"], "'much' is not a size in bytes"),
        (["--memory", "cpu:5=1GB"], "no device 'cpu:5'"),
        (["--memory", "100B"], "more than the largest device has (100)"),
        (["--cluster", "nets.py"], "nets.py, line"),
        (["--cluster", "lab.yaml"], "cannot read the cluster file lab.yaml"),
        (["--cluster", "lab.yaml", "--devices", "2"], "--devices and --cluster both say"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_met_are_refused(words: list[str], said: str, run: Run) -> None:
    status, _, err = run("compile", "nets:make", "--input", "2x12", *words)
    assert (status, said in err) == (1, True), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "nets:mak", "--input", "2x12"], "did you mean 'make'?"),
        (["plan", "nets:make", "--input", "2x12", "--devices", "tpu:0"], "unknown device 'tpu:0'"),
        (["plan", "nets:Branching", "--input", "2x12"], "nets.py:"),
        (["report", "nothing.pipe"], "there is no saved pipeline at nothing.pipe"),
        (["report", "nothing.pipe", "-o", "nets.py/a.html"], "cannot write nets.py/a.html"),
    ],
)
def test_errors(run: Run, words: list[str], said: str) -> None:
    status, _, err = run(*words)
    assert (status, said in err) == (1, True), err
    assert "Traceback" not in err


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags match."""

    EMPTY = frozenset({"meta", "br", "rect", "line", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_report_of_a_stream(folder: Path, run: Run) -> None:
    assert run("compile", "nets:make", "--input", "2x12", "-o", "net.pipe")[0] == 0
    status, out, err = run("report", "net.pipe")
    assert status == 0, err
    assert "predicted" in out
    assert "measured" not in out
    words = ("report", "net.pipe", "--input", "random:60", "--inline", "-o", "page.html", "--trace", "trace.json")
    status, out, err = run(*words)
    assert status == 0, err
    assert "predicted | measured" in out
    assert "stage 0" in out
    text = (folder / "page.html").read_text()
    page = Page(text)
    assert page.links == [], "it opens without a network"
    assert "<script" not in text
    assert page.seen.count("svg") == 3
    assert "Measured over 60 samples" in text
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    computed = [e for e in events if e["ph"] == "X" and e["cat"] == "compute" and e["pid"] == 1]
    assert {event["args"]["sample"] for event in computed} == set(range(60))
    status, out, err = run("report", "net.pipe", "--input", "random:60", "--inline", "--json")
    data = json.loads(out)
    assert data["measured"]["samples"] == 60
    assert [stage["index"] for stage in data["stages"]] == [0, 1]
    assert data["edges"][0]["source"] == "caller"
    status, _, err = run("report", "net.pipe", "--input", "random:0")
    assert status == 1
