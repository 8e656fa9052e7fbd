"""Checks of kind ``tcp``: a handshake, or a text that is sent and an answer that is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.checker.probes.expecting import Expecting
from forwarder.checker.probes.stream import Asking, Connecting

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome, Probe
    from forwarder.config.model import Check


def begin(check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Probe:
    """See :class:`~forwarder.checker.outcome.Begin`."""
    if check.send or check.expect:
        return Asking(check, aim, loop, done, check.send, Expecting(check))
    return Connecting(check, aim, loop, done)
