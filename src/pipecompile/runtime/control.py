"""Messages on the socket between a worker and its parent: four bytes of length, then JSON."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

#: The kernel lets 253 through in one message.
_FDS_AT_ONCE = 250


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Send one message whole."""
    data = json.dumps(message).encode()
    channel.sendall(len(data).to_bytes(4, "big") + data)


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    head = _exactly(channel, 4)
    body = _exactly(channel, int.from_bytes(head, "big")) if head else None
    return None if body is None else json.loads(body)


def send_fds(channel: socket.socket, fds: Sequence[int], word: bytes = b"d") -> None:
    """Send copies of descriptors; on a socket that keeps messages apart, ``word`` may be of any length."""
    for at in range(0, len(fds), _FDS_AT_ONCE):
        socket.send_fds(channel, [word], fds[at : at + _FDS_AT_ONCE])


def receive_fds(channel: socket.socket, count: int) -> list[int]:
    """As many descriptors, closed on exec.

    Raises:
        EOFError: if fewer came.
    """
    fds: list[int] = []
    while len(fds) < count:
        _, more, _, _ = socket.recv_fds(channel, 1, _FDS_AT_ONCE, socket.MSG_CMSG_CLOEXEC)
        if not more:
            raise EOFError(f"{count} descriptors were announced, {len(fds)} came")
        fds += more
    return fds


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        try:
            part = channel.recv(count)
        except (ConnectionError, TimeoutError):
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
