"""Numbers as people read them."""

from __future__ import annotations


def time(seconds: float) -> str:
    """Three significant digits in s, ms or µs."""
    if seconds == 0:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            value = seconds * scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError


def nbytes(count: int) -> str:
    """Bytes in B, kB, MB or GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def share(part: float) -> str:
    """Per cent."""
    return f"{part:.0%}"
