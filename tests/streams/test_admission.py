"""The policies, event by event, against a plain simulation of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipecompile.streams.feed as feed_module
from hand_made import RELAXED
from oracles.admission import simulate_policy
from pipecompile.errors import InputError, Overloaded
from pipecompile.streams.entrance import Options
from pipecompile.streams.feed import Feed
from streams.stream_parts import FakeEngine, balanced

POLICIES = ["block", "drop_oldest", "drop_newest", "latest", "error"]
EVENTS = st.lists(
    st.one_of(
        st.just(("arrive", 0.0)), st.just(("finish", 0.0)), st.tuples(st.just("pass"), st.sampled_from([0.5, 1.0, 3.0]))
    ),
    max_size=80,
)


def run(policy: Any, limit: int, deadline: float | None, events: list[tuple[str, float]]) -> dict[str, list[int]]:
    """The same events through a real feed; every account on the way must balance."""
    engine, now = FakeEngine(), 0.0
    found: dict[str, list[int]] = {"delivered": [], "dropped": [], "refused": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module, "clock", lambda: now)
        feed = Feed(engine, Options(policy, limit, deadline))  # type: ignore[arg-type]
        for kind, seconds in events:
            if kind == "pass":
                now += seconds
            elif kind == "finish":
                engine.session.finish()
                if feed.inside and (entry := feed.collect(wait=False)) is not None:
                    assert feed.deliver(entry) == entry.sequence * 2
                    found["delivered"].append(entry.sequence)
            elif not (policy == "block" and feed.entrance.refuses):  # a source that blocks comes again later
                with feed.changed:
                    entry = feed.entry(feed.sequence)
                    try:
                        found["dropped"] += [gone.sequence for gone in feed.offer(entry)]
                    except Overloaded:
                        found["dropped"].append(entry.sequence)
                        found["refused"].append(entry.sequence)
            assert balanced(engine.ledger.counts())
            found["dropped"] += [late.sequence for late in feed.admit()]
            counts = engine.ledger.counts()
            assert balanced(counts)
            assert counts.in_flight == len(feed.inside) + len(feed.entrance)
            assert counts.delivered == len(found["delivered"])
            assert counts.dropped == len(found["dropped"])
            assert len(feed.inside) <= limit
        found["inside"] = [entry.sequence for entry in feed.inside]
        found["waiting"] = [entry.sequence for entry in feed.entrance._waiting]
    return found


@pytest.mark.parametrize("policy", POLICIES)
@RELAXED
@given(limit=st.integers(1, 4), deadline=st.sampled_from([None, 0.0, 1.0, 2.0]), events=EVENTS)
def test_each_policy_does_what_its_simulation_does(
    policy: Any, limit: int, deadline: float | None, events: list[tuple[str, float]]
) -> None:
    assert run(policy, limit, deadline, events) == simulate_policy(policy, limit, limit, deadline, events)


def test_the_simulation_tells_the_policies_apart() -> None:
    events = [("arrive", 0.0)] * 6 + [("finish", 0.0)] * 6
    found = {policy: simulate_policy(policy, 1, 2, None, events)["delivered"] for policy in POLICIES}
    assert found == {
        "block": [0, 1, 2],
        "drop_oldest": [0, 4, 5],
        "drop_newest": [0, 1, 2],
        "latest": [0, 5],
        "error": [0, 1, 2],
    }


@RELAXED
@given(stages=st.integers(1, 5), beats=st.integers(1, 60))
def test_latest_delivers_what_is_at_most_stages_and_a_bit_old(stages: int, beats: int) -> None:
    """Logical time: every stage takes one beat of five ticks, a sample arrives each tick."""
    engine = FakeEngine(stages)
    feed = Feed(engine, Options("latest"))  # type: ignore[arg-type]
    line: list[int] = []  # beats left of those inside, as a pipeline of stages would have them
    for beat in range(beats):
        for _ in range(5):
            with feed.changed:
                feed.offer(feed.entry(feed.sequence))
            feed.admit()
            line += [stages] * (len(feed.inside) - len(line))
        # One beat: the samples one behind the other each move on by one stage.
        occupied = set()
        for place, left in enumerate(line):
            if left not in occupied:
                occupied.add(left)
                line[place] = left - 1
        if line and line[0] == 0:
            line.pop(0)
            engine.session.finish()
            entry = feed.collect(wait=False)
            assert entry is not None
            feed.deliver(entry)
            age = feed.sequence - entry.sequence
            # The first ones fill the pipeline all at once and queue before its first stage.
            assert age <= 5 * (stages + 1 if beat > 2 * stages else 2 * stages)
    assert engine.ledger.counts().delivered == max(0, beats - stages + 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_overload": "newest"}, "on_overload='newest' is none of 'block', 'drop_oldest'"),
        ({"on_error": "ignore"}, "on_error='ignore' is none of 'raise', 'skip', 'return'"),
        ({"max_in_flight": 0}, "max_in_flight=0"),
        ({"deadline": -1.0}, "deadline=-1"),
        ({"deadline": float("nan")}, "deadline=nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Options(**options)


def test_a_sample_that_is_over_cannot_be_over_again() -> None:
    engine = FakeEngine()
    feed = Feed(engine, Options())  # type: ignore[arg-type]
    entry = feed.entry(1)
    engine.ledger.close(entry, "dropped")
    with pytest.raises(KeyError):
        engine.ledger.close(entry, "delivered")
