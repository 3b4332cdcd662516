from __future__ import annotations

import hand_made
import pipecompile.schedules.stream
from pipecompile.ir.timeline import Event, Timeline
from pipecompile.simulate import clock_table, simulate, ticks


def test_table_of_the_stream_schedule() -> None:
    table = clock_table(ticks(hand_made.chain_program(3), 6))
    assert table == "\n".join(
        [
            "tick     0 1 2 3 4 5 6 7",
            "stage 0  0 1 2 3 4 5 . .",
            "stage 1  . 0 1 2 3 4 5 .",
            "stage 2  . . 0 1 2 3 4 5",
        ]
    )


def test_the_table_drawn_at_the_schedule_is_the_one_it_makes() -> None:
    rows = [line.split() for line in clock_table(ticks(hand_made.chain_program(3), 6)).splitlines()]
    drawn = [line.split() for line in (pipecompile.schedules.stream.__doc__ or "").splitlines()]
    assert [line for line in drawn if line[:1] in (["tick"], ["stage"])] == rows


def test_unequal_stages() -> None:
    plan = hand_made.plan([[0], [1]], [1.0, 2.0])
    timeline = simulate(hand_made.chain_program(2), plan, hand_made.FREE_LINK, 3)  # stage 1 works 1-3, 3-5, 5-7
    fine = [line.split()[2:] for line in clock_table(timeline, tick=1.0).splitlines()[1:]]
    assert fine[1] == [".", "0", "0", "1", "1", "2", "2"]
    # Stage 0 computes 0, 1 and 2 at once (two wait in the ring); the longer stage gives the default tick.
    assert fine[0] == ["0", "1", "2", ".", ".", ".", "."]
    assert clock_table(timeline) == clock_table(timeline, tick=2.0)


def test_wide_numbers_stay_in_their_columns() -> None:
    events = tuple(Event(0, 0, "F", 95 + i, float(i), float(i + 1)) for i in range(10))
    head, row = clock_table(Timeline(events, "measured")).splitlines()
    assert len(head) == len(row)
    assert row.split()[2:] == [str(95 + i) for i in range(10)]


def test_a_sample_fills_the_ticks_whose_middle_it_covers() -> None:
    events = (Event(0, 0, "F", 0, 0.4, 1.4), Event(0, 0, "F", 1, 1.6, 3.4), Event(0, 0, "F", 2, 4.2, 4.8))
    assert clock_table(Timeline(events, "measured"), tick=1.0).splitlines()[1].split()[2:] == ["0", ".", "1", ".", "2"]


def test_nothing_to_draw() -> None:
    assert clock_table(Timeline((), "simulated")) == "(nothing is computed)"
