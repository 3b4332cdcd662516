"""Messages between a trainer and its workers: eight bytes of length, then cloudpickle.

Only over the private socket pair of a worker this process started; never in files.
"""

from __future__ import annotations

import socket
from typing import Any

import cloudpickle
import torch

from pipecompile.ir.tree import flatten, unflatten

_NO_NUMPY = frozenset({torch.bfloat16})


def send(channel: socket.socket, message: Any) -> None:
    """Send one message whole."""
    data = cloudpickle.dumps(message)
    channel.sendall(len(data).to_bytes(8, "big") + data)


def receive(channel: socket.socket) -> Any:
    """The next message.

    Raises:
        EOFError: if the other side is gone.
    """
    size = int.from_bytes(_exactly(channel, 8), "big")
    return cloudpickle.loads(_exactly(channel, size))


def _exactly(channel: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, at = memoryview(data), 0
    while at < count:
        try:
            got = channel.recv_into(view[at:])
        except ConnectionError as error:
            raise EOFError("the other side is gone") from error
        if not got:
            raise EOFError("the other side is gone")
        at += got
    return data


def packed(nest: Any) -> Any:
    """A nest of tensors in a form that pickles fast: tensors as NumPy arrays where NumPy knows the dtype."""
    leaves, tree = flatten(nest)
    return tree, [leaf if leaf.dtype in _NO_NUMPY else leaf.detach().contiguous().numpy() for leaf in leaves]


def unpacked(pack: Any) -> Any:
    """The inverse of :func:`packed`."""
    tree, leaves = pack
    return unflatten(tree, [leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf) for leaf in leaves])


__all__ = ["packed", "receive", "send", "unpacked"]
