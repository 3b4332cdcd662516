"""Process-wide torch settings that change results; workers copy the caller's, all executors pin the rest."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


def snapshot() -> dict[str, Any]:
    """The caller's settings as JSON data."""
    return {
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "mkldnn": bool(torch.backends.mkldnn.enabled),
    }


def restore(settings: dict[str, Any]) -> None:
    """Apply a snapshot to this process."""
    torch.set_default_dtype(getattr(torch, settings["default_dtype"]))
    torch.set_float32_matmul_precision(settings["matmul_precision"])
    wanted = settings["deterministic"], settings["warn_only"]
    # Setting it tells torch's compiler, too, which takes a second to import.
    if wanted != (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()):
        torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])
    torch.backends.mkldnn.set_flags(settings["mkldnn"])


@contextmanager
def stage_mode(threads: int = 1) -> Generator[None]:
    """Compute here as a worker does: that many threads, no gradients, no fused attention path.

    The fused path of ``nn.MultiheadAttention`` gives other last bits than the ops it replaces.
    """
    before, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    try:
        if before != threads:
            torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if before != threads:
            torch.set_num_threads(before)
