"""The numbers of a report against a pipeline whose times are known by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hand_made import chain_program, plan
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.timeline import Event, Timeline
from pipecompile.ir.tree import Tree
from pipecompile.report import units
from pipecompile.report.chrome import chrome_trace
from pipecompile.report.gantt import gantt, ticks, window
from pipecompile.report.html import html
from pipecompile.report.summary import steady, summarise


def package(names: tuple[str, ...] = ("a", "b", "c", "d")) -> Package:
    """Two stages of 2 and 3 seconds."""
    cut = replace(plan([[0, 1], [2, 3]], [2.0, 3.0]), layer_names=names)
    modules = tuple(DeviceModule(i, (i,), "", f"device_{i}.py", ()) for i in range(2))
    spec = TensorSpec.of(torch.zeros(1, 4))
    return Package("Net", modules, cut, chain_program(2), (), (spec,), ("x",), (), Tree("leaf"), Tree("leaf"))


def timeline(samples: int = 20, origin: str = "measured", slow: float = 1.0) -> Timeline:
    """Stage 0 computes 2 s and sends 0.5 s; stage 1 computes 3 s and sends 0.25 s; a sample every 4 s."""
    events: list[Event] = []
    for i in range(samples):
        at = 4.0 * i
        for device, begin, computing, sending, edge in ((0, 0.0, 2.0, 0.5, "0>1"), (1, 2.5, 3.0, 0.25, "1>host")):
            start = at + begin
            events.append(Event(device, device, "F", i, start, start + computing))
            events.append(Event(device, device, "SEND", i, start + computing, start + computing + sending, edge))
            events.append(Event(device, device, "wait", i, start + computing + sending, start + 4.0, "0>1"))
    finishes = tuple(4.0 * i + 6.0 for i in range(samples))
    scaled = tuple(replace(e, start=e.start * slow, end=e.end * slow) for e in events)
    return Timeline(scaled, origin, (6.0 * slow,) * samples, tuple(f * slow for f in finishes))  # type: ignore[arg-type]


def test_costs_are_those_of_the_steady_state() -> None:
    found = summarise(package(), timeline(origin="simulated"), timeline(slow=2.0))
    first, second = found.stages
    assert (first.predicted.compute, first.predicted.send, first.predicted.wait) == pytest.approx((2.0, 0.5, 1.5))
    assert (second.predicted.compute, second.predicted.send, second.predicted.wait) == pytest.approx((3.0, 0.25, 0.75))
    assert second.measured is not None
    assert second.measured.wait == pytest.approx(1.5)
    assert second.predicted.busy == pytest.approx(3.25 / 4)
    assert second.predicted.period == pytest.approx(4.0)
    assert (found.predicted.throughput, found.predicted.latency) == pytest.approx((0.25, 6.0))
    assert found.measured is not None
    assert found.measured.throughput == pytest.approx(0.125)
    by_name = {edge.name: edge for edge in found.edges}
    assert by_name["0>1"].predicted == pytest.approx(0.5)
    assert by_name["0>1"].measured == pytest.approx(1.0)
    assert by_name["host>0"].measured is None
    assert first.layers == ("a", "b")
    assert json.loads(json.dumps(found.to_json()))["stages"][1]["predicted"]["compute"] == pytest.approx(3.0)


def test_warm_up_and_stragglers_do_not_count() -> None:
    seen = timeline()
    odd = tuple(replace(e, end=e.end + 100.0) if e.sample in (0, 19) and e.activity == "F" else e for e in seen.events)
    found = summarise(package(), replace(seen, events=odd))
    assert found.stages[0].predicted.compute == pytest.approx(2.0)
    assert steady(seen) == range(5, 15)


@pytest.mark.parametrize("samples", [0, 1, 2, 3])
def test_short_streams_make_a_report_too(samples: int) -> None:
    found = summarise(package(), timeline(samples, "simulated"), timeline(samples))
    assert found.predicted.samples == samples
    text = html(package(), timeline(samples, "simulated"), timeline(samples))
    assert "Net" in text
    assert "nan" not in text.lower().replace("nanometre", "")


def test_gantt_places_events_by_their_time() -> None:
    seen = timeline()
    begin, span = window(seen, shown=4)
    drawn = gantt(seen, ("cpu:0", "cpu:1"), begin, span)
    assert [name for name, _ in drawn.rows] == ["cpu:0", "cpu:1"]
    for device, (_, bars) in enumerate(drawn.rows):
        assert bars
        for bar in bars:
            assert 0.0 <= bar.x <= bar.x + bar.width <= 1.0 + 1e-9
            if bar.kind == "F" and bar.width * span == pytest.approx(bar.seconds):
                assert begin + bar.x * span == pytest.approx(4.0 * bar.sample + (2.5 if device else 0.0))
    shown = {bar.sample for _, bars in drawn.rows for bar in bars if bar.kind == "F"}
    assert len(shown) >= 4


@pytest.mark.parametrize("span", [3e-5, 0.0004, 0.01, 0.33, 1.0, 7.0, 500.0])
def test_ticks_are_round_evenly_spaced_and_within_the_axis(span: float) -> None:
    found = ticks(span)
    assert 3 <= len(found) <= 10
    steps = [b - a for (a, _), (b, _) in pairwise(found)]
    assert all(step == pytest.approx(steps[0]) for step in steps)
    assert found[0][1].startswith("0 ")
    assert found[-1][0] <= 1.0 + 1e-9
    assert ticks(0.0) == ()


def test_the_page_escapes_what_a_model_is_called_and_shows_every_event() -> None:
    text = html(replace(package(("<b>one</b>", "b", "c", "d")), model="A<script>"), timeline(origin="simulated"))
    assert "<script" not in text
    assert "A&lt;script&gt;" in text
    assert "&lt;b&gt;one&lt;/b&gt;" in text
    assert "nothing was run" in text
    assert "computes sample" in text


def test_a_chrome_trace_has_every_event_once_in_microseconds() -> None:
    seen = timeline(3)
    events = json.loads(chrome_trace(package(), timeline(3, "simulated"), seen))["traceEvents"]
    measured = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert len(measured) == len(seen.events)
    one = next(e for e in measured if e["name"] == "compute 1" and e["tid"] == 2)
    assert (one["ts"], one["dur"]) == pytest.approx((6.5e6, 3e6))
    titles = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert titles == ["Net, simulated", "Net, measured"]
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"cpu:0", "cpu:1"}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0"),
        (2.5e-7, "0.25 µs"),
        (3.21e-5, "32.1 µs"),
        (0.00999, "9.99 ms"),
        (0.25, "250 ms"),
        (12.3456, "12.3 s"),
    ],
)
def test_times_as_people_read_them(seconds: float, said: str) -> None:
    assert units.time(seconds) == said


def test_bytes_as_people_read_them() -> None:
    assert [units.nbytes(n) for n in (0, 999, 1000, 602112, 12_345_678, 3 * 10**9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "602 kB",
        "12.3 MB",
        "3 GB",
    ]
