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

#: What torch's own modules decide by values, by the function that does: how to spare it that.
_IN_TORCH = {
    "_detect_is_causal_mask": "say whether the mask is causal: is_causal= of an encoder or decoder, tgt_is_causal= (and "
    "the like) of nn.Transformer",
    **dict.fromkeys(
        ("RNN.forward", "GRU.forward", "LSTM.forward"),
        "a packed sequence depends on lengths: give the recurrent layer the padded batch, and mask its result",
    ),
    "_BatchNorm.forward": "momentum=None averages over a counter; give BatchNorm a number as momentum",
}


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
    if not own and not frames and (layer := _layer(error, model)):
        where = layer
    functions = {frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)}
    known = next((hint for function, hint in _IN_TORCH.items() if function in functions), "")
    hint = known or next(
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


def _layer(error: Exception, model: nn.Module) -> str:
    """The innermost module of the model in a traceback, in words."""
    names = {id(module): name for name, module in model.named_modules() if name}
    within = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [inner for inner in within if isinstance(inner, nn.Module) and id(inner) in names]
    return f"layer {names[id(found[-1])]!r} ({type(found[-1]).__name__})" if found else ""
