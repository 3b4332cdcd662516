"""Generated source becomes a running module, and its line numbers become model source again."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from pipecompile.errors import PipelineError
from pipecompile.runtime.channels.ring import RingReceiver, RingSender

_STAGE = re.compile(r"stage_(\d+)")


def execute(source: str, filename: str) -> dict[str, Any]:
    """Run generated source in a fresh namespace.

    Its lines are registered with ``linecache``, so that tracebacks and pdb show them even where
    no such file exists.
    """
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"pipecompile.generated.{re.sub(r'[^0-9A-Za-z_]', '_', filename)}"}
    exec(compile(source, filename, "exec"), namespace)
    if "__builtins__" not in namespace:  # pragma: no cover - CPython always adds it
        raise PipelineError(f"{filename} could not be executed")
    return namespace


def resume(
    run: Any, link: Any, ports: Sequence[RingReceiver | RingSender], sample: int, replicas: int
) -> Iterator[Any]:
    """The generator of a device that goes on after ``sample`` failed in it or before it.

    What is left of the sample's messages is taken, the word of its failure is sent where its
    values would have gone, and ``run`` begins anew with the device's next sample. May be called again for
    the same sample, when one of the messages left turns out to be such a word itself.
    """
    for port in ports:
        if isinstance(port, RingReceiver) and port.sample == sample:
            yield port
    for port in ports:
        if isinstance(port, RingSender) and port.sample == sample:
            yield port
            port.fail(sample)
    yield from run(link, sample + replicas)


def describe(error: BaseException, filename: str, device: int, stages: Sequence[int], sample: int) -> dict[str, Any]:
    """Stage, layer and source line of an exception raised under the module ``filename``.

    The result is JSON data: the keyword arguments of :class:`~pipecompile.errors.StageError`.

    The layer is the nearest comment above the failing line in the innermost frame of the module:
    generated code carries one above each group of lines, such as
    ``# layer1.0.conv1  (modeling_resnet.py:58)``.
    """
    stage, layer, line = (stages[0] if stages else -1), "", filename
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == filename:
            found = _STAGE.fullmatch(frame.f_code.co_name)
            stage = int(found[1]) if found else stage
            layer = _comment_above(frame, number)
            line = f"{filename}:{number}: {linecache.getline(filename, number).strip()}"
    trace = "".join(traceback.format_exception(error))
    return {
        "raised": type(error).__name__,
        "reason": str(error),
        "trace": trace,
        "device": device,
        "stage": stage,
        "sample": sample,
        "layer": layer,
        "line": line,
    }


def _comment_above(frame: FrameType, number: int) -> str:
    filename = frame.f_code.co_filename
    for above in range(number, frame.f_code.co_firstlineno, -1):
        text = linecache.getline(filename, above).strip()
        if text.startswith("#"):
            return text.lstrip("# ")
    return ""
