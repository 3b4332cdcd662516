"""Say why a model cannot be captured, where in its source, and what to try."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from torch import nn

from pipecompile.errors import TraceError


def is_torch(filename: str) -> bool:
    """Whether a source file belongs to torch, to this package or to no one."""
    parts = Path(filename).parts
    return "torch" in parts or "pipecompile" in parts or filename.startswith("<")


_HINTS = (
    (
        ("data-dependent", "GuardOnDataDependent", "Could not guard", "aten._local_scalar_dense"),
        "the path taken depends on the values of tensors; use torch.where, torch.cond, index_select and index_copy_, or a fixed bound",
    ),
    (("Dim", "dynamic_shapes", "Constraints violated"), "check dynamic_shapes: see the constraint named above"),
    (
        ("not supported", "Unsupported", "unsupported"),
        "replace the operation, or move it out of the model",
    ),
)


def explain(error: Exception, model: nn.Module) -> TraceError:
    """What export raised, as one error: the reason, the model's own source line and what to try."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_torch(f.filename)]
    text = str(error).strip() or type(error).__name__
    quoted = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', text)
    own = [frame for frame in quoted if not is_torch(frame[0])]
    if own:
        where = f"{own[-1][0]}:{own[-1][1]}: {own[-1][2].strip()}"
    elif frames:
        where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
    else:
        where = "unknown place"
    hint = next(
        (hint for words, hint in _HINTS if any(word in text or word in type(error).__name__ for word in words)),
        "it runs in plain PyTorch, but torch.export cannot follow this line: write it with tensor operations whose "
        "shapes do not depend on values, or keep it outside the model",
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    details = 4 if "Constraints" in lines[0] else 1  # what is wrong with dynamic_shapes comes after the first line
    reason = "\n          ".join(lines[:details])
    return TraceError(
        f"{type(model).__name__} cannot be captured as one graph.\n"
        f"  reason: {type(error).__name__}: {reason[:600]}\n  where:  {where}\n  try:    {hint}"
    )
