"""One sample through the pipeline and back: what calling a pipeline does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipecompile.errors import StageError
from pipecompile.streams.engine import CALL, Engine
from pipecompile.streams.ledger import End, Entry


def call(engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The model's result for one call; see :meth:`~pipecompile.InferencePipeline.forward`."""
    engine.claim(CALL)
    try:
        leaves = engine.arguments.of_call(args, kwargs)
        session = engine.ready(leaves)
        entry, end = Entry(0, None, 0.0), "failed"
        engine.ledger.open(entry)
        try:
            with session.awake():
                while (number := session.submit(leaves)) is None:  # a worker has yet to offer its first slot
                    engine.guard(session.wait)
                found = _result(engine, number)
            result = engine.rebuild(found)
            end: End = "delivered"
            return result
        finally:
            engine.ledger.close(entry, end)
    finally:
        engine.release()


def _result(engine: Engine, number: int) -> list[Any]:
    """The leaves of sample ``number``; results of calls that were interrupted come before it and go."""
    session = engine.session
    assert session is not None
    while True:
        try:
            found, leaves = engine.guard(session.result)
        except StageError as error:
            if error.sample < number:
                continue
            error.sample = 0  # a call is a stream of one
            raise
        if found >= number:
            return leaves
