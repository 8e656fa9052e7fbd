"""Checks of kind ``http``: the status of a GET. Nothing else of the answer is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.checker.probes.names import host_header
from forwarder.checker.probes.readers import StatusLine
from forwarder.checker.probes.stream import Asking

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome, Probe
    from forwarder.config.model import Check

_PORT: Final = 80


def begin(check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Probe:
    """See :class:`~forwarder.checker.outcome.Begin`."""
    return Asking(check, aim, loop, done, request(check, aim), StatusLine(check.status))


def request(check: Check, aim: Aim) -> bytes:
    """What is asked: RFC 9112."""
    return (
        f"GET {check.path} HTTP/1.1\r\n"
        f"Host: {host_header(check, aim, _PORT)}\r\n"
        "User-Agent: forwarder\r\n"
        "Accept: */*\r\n"
        "Connection: close\r\n"
        "\r\n"
    ).encode()
