"""The one place here that touches torch internals: which names under ``torch.ops.aten`` are tensor operators.

``tests/artefact/test_allow.py`` tells when one of them moves.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch


def is_tensor_operator(name: str, overload: str) -> bool:
    """Whether ``aten.<name>.<overload>`` is an operator of the dispatcher.

    Other things answer to such a path: the Python attributes of the operator object
    (``aten.add.__getattribute__`` reaches anything), and functions that exist for TorchScript only
    (``aten.save`` writes files).
    """
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        return False
    found = getattr(packet, overload)
    return isinstance(found, torch._ops.OpOverload) and bool(torch._C._dispatch_has_kernel(found.name()))
