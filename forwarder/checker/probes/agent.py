"""Checks of kind ``agent``: a program beside the server says how the server is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.checker.probes.readers import AgentLine
from forwarder.checker.probes.stream import Asking

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome, Probe
    from forwarder.config.model import Check


def begin(check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Probe:
    """See :class:`~forwarder.checker.outcome.Begin`."""
    return Asking(check, aim, loop, done, check.send, AgentLine())
