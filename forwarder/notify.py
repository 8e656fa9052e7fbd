"""Telling a service manager what we do: sd_notify(3) without a library.

Says nothing unless ``NOTIFY_SOCKET`` is set. Never raises and never blocks: a service manager that
does not listen must not cost anything.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1`` in one datagram."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto("\n".join(assignments).encode(), address)
