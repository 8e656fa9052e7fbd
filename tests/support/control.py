"""Asking a running forwarder over its control socket."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path


def ask(control: Path | str, op: str, **more: object) -> dict[str, object]:
    """The answer to a request."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(control))
        sock.sendall(json.dumps({"op": op, **more}).encode() + b"\n")
        with sock.makefile("rb") as file:
            answer = json.loads(file.readline())
    assert isinstance(answer, dict)
    return answer
