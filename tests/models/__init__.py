"""The zoo: small models the compiler is tried on, by name."""

from __future__ import annotations

from models import attention, convolution, hub_multi, hub_text, hub_vision, operations, recurrent, state, structure
from models.registry import CASES, Case

CORE = [entry for entry in CASES.values() if entry.core]
REST = [entry for entry in CASES.values() if not entry.core and not entry.refused]
REFUSED = [entry for entry in CASES.values() if entry.refused]

__all__ = [
    "CASES",
    "CORE",
    "REFUSED",
    "REST",
    "Case",
    "attention",
    "convolution",
    "hub_multi",
    "hub_text",
    "hub_vision",
    "operations",
    "recurrent",
    "state",
    "structure",
]
