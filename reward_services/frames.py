"""Messages over a pipe: eight bytes of length, then the message."""

from __future__ import annotations

import os
import selectors
import struct
import time
from typing import IO

_LENGTH = struct.Struct("<Q")
_PIECE = 1 << 16


def write_frame(stream: IO[bytes], message: bytes) -> None:
    """Send one message."""
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Receive one message; None: the other side has closed the pipe."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    message = stream.read(length)
    return message if len(message) == length else None


def exchanged(
    requests: int, replies: int, message: bytes | None, *, peer: int, deadline_s: float
) -> bytes | None:
    """Send a message, if there is one, and receive the reply; None: the peer died or hung up.

    All three are file descriptors, the pipes' non-blocking and `peer` a pidfd: a pipe says
    nothing of the peer's end while a process that the peer started still holds it. TimeoutError
    when the time is over, whoever reads or writes slowly.
    """
    ends_at = time.monotonic() + deadline_s
    unsent = memoryview(b"" if message is None else _LENGTH.pack(len(message)) + message)
    received = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(peer, selectors.EVENT_READ)
        selector.register(replies, selectors.EVENT_READ)
        if unsent:
            selector.register(requests, selectors.EVENT_WRITE)
        while True:
            left = ends_at - time.monotonic()
            ready = {key.fd for key, _ in selector.select(max(left, 0))}
            if replies in ready:
                piece = _read(replies)
                if not piece:
                    return None
                received += piece
                if (reply := _whole(received)) is not None:
                    return reply
            elif peer in ready:
                return None
            elif left <= 0:
                raise TimeoutError
            if requests in ready:
                unsent = unsent[_written(requests, unsent) :]
                if not unsent:
                    selector.unregister(requests)


def _whole(received: bytearray) -> bytes | None:
    """The message, once all of it is there."""
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    end = _LENGTH.size + length
    return bytes(received[_LENGTH.size : end]) if len(received) >= end else None


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _PIECE)
    except OSError:  # closed
        return b""


def _written(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data[:_PIECE])
    except BlockingIOError:
        return 0
    except OSError:  # the peer reads no longer; that it died, or that it is late, comes next
        return len(data)
