"""Generated source becomes a running module, and its line numbers become model source again."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from pipecompile.errors import PipelineError, StageError

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


@dataclass(frozen=True)
class Failure:
    """What went wrong in a device module, in the model's own terms. Travels as JSON."""

    raised: str
    message: str
    trace: str
    device: int
    stage: int
    sample: int
    layer: str
    line: str

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def error(self) -> StageError:
        """The exception for the caller."""
        where = f" in layer {self.layer}" if self.layer else ""
        sample = f"at sample {self.sample}" if self.sample >= 0 else "before the first sample"
        return StageError(
            f"stage {self.stage} on device {self.device} raised {self.raised} {sample}{where}: {self.message}\n"
            f"  at {self.line}\n\nTraceback on the device:\n{self.trace}"
        )


def describe(error: BaseException, filename: str, device: int, stages: Sequence[int], sample: int) -> Failure:
    """Find stage, layer and source line of an exception raised under the module ``filename``.

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
    return Failure(type(error).__name__, str(error), trace, device, stage, sample, layer, line)


def _comment_above(frame: FrameType, number: int) -> str:
    filename = frame.f_code.co_filename
    for above in range(number, frame.f_code.co_firstlineno, -1):
        text = linecache.getline(filename, above).strip()
        if text.startswith("#"):
            return text.lstrip("# ")
    return ""
