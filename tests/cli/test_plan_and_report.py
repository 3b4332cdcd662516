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
