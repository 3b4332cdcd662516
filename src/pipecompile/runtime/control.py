"""Messages on the socket between a worker and its parent: four bytes of length, then JSON."""

from __future__ import annotations

import json
import socket
from typing import Any


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Send one message whole."""
    data = json.dumps(message).encode()
    channel.sendall(len(data).to_bytes(4, "big") + data)


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    head = _exactly(channel, 4)
    body = _exactly(channel, int.from_bytes(head, "big")) if head else None
    return None if body is None else json.loads(body)


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
