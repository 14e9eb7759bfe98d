"""Whether anything answers at the address of a cluster. Refuses to know what runs there."""

from __future__ import annotations

import socket

from grpo.errors import UserError

CONNECT_TIMEOUT_S = 5.0


def require_listener(address: str) -> None:
    """Ray itself would try for minutes; an address without a port ("auto", "local") is its own."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS is {address}, but nothing answers there ({error}): start the cluster, "
            "correct the address, or unset RAY_ADDRESS to use this machine alone"
        ) from error
