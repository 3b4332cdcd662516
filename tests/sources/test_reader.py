"""The thread behind a source: order, errors, the newest only, and an end in every case."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from typing import Any

import pytest

from pipecompile.sources.reader import Reader


def endless(closed: threading.Event) -> Any:
    def produce(stop: threading.Event) -> Generator[int]:
        try:
            number = 0
            while not stop.is_set():
                yield number
                number += 1
        finally:
            closed.set()

    return produce


def test_order_and_everything_there() -> None:
    def produce(_: threading.Event) -> Generator[int]:
        yield from range(1000)

    assert list(Reader(produce, ahead=3)) == list(range(1000))


def test_an_error_comes_after_the_items_before_it() -> None:
    def produce(_: threading.Event) -> Generator[int]:
        yield 1
        yield 2
        raise ValueError("the end of it")

    reader, got = Reader(produce), list[int]()

    with pytest.raises(ValueError, match="the end of it"):
        got.extend(reader)
    assert got == [1, 2]
    assert list(reader) == [], "said once"


def test_the_newest_is_kept_and_the_others_counted() -> None:
    last, go_on = threading.Event(), threading.Event()

    def produce(_: threading.Event) -> Generator[int]:
        yield from range(100)
        last.set()
        go_on.wait(10)

    reader = Reader(produce, newest=True)
    assert last.wait(10)
    assert next(reader) == 99
    assert reader.skipped == 99
    go_on.set()
    assert list(reader) == []


@pytest.mark.parametrize("newest", [False, True])
def test_close_ends_the_thread_and_the_generator(newest: bool) -> None:
    closed = threading.Event()
    reader = Reader(endless(closed), newest=newest)
    next(reader)
    reader.close()
    reader.close()
    assert not reader.alive
    assert closed.is_set()
    assert list(reader) == []


def test_a_reader_nobody_holds_any_more_ends() -> None:
    closed = threading.Event()
    reader = Reader(endless(closed))
    next(reader)
    thread = reader._thread
    del reader
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert closed.is_set()


def test_close_wakes_who_waits_for_an_item() -> None:
    def produce(stop: threading.Event) -> Generator[int]:
        stop.wait(30)
        yield from ()

    reader = Reader(produce)
    threading.Timer(0.1, reader.close).start()
    assert list(reader) == []
