"""What a check finds out, and what each kind of check is to its caller: interfaces, and values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.config.model import Check
    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr, Target


class Word(Enum):
    """What an agent wants of its server, whether it is well or not."""

    READY = "ready"
    DRAIN = "drain"  # no new sessions
    MAINT = "maint"  # the same; it is being worked on


class Advice(NamedTuple):
    """The answer of an agent. What it leaves out is None, and stays as it was last said.

    ``percent`` is a part of the configured weight, 0 to 100; ``weight`` takes its place, 0 to 256.
    ``max_sessions`` bounds sessions, 0 is no limit. ``is_up``: up or down, at once and whatever
    ``fall`` and ``rise`` are.
    """

    percent: int | None = None
    weight: int | None = None
    max_sessions: int | None = None
    word: Word | None = None
    is_up: bool | None = None


class Outcome(NamedTuple):
    """How a check ended.

    ``why`` says what was wrong, in a few words for one line: ``http 503``, ``refused``; for a good
    one it may say something worth knowing. ``advice`` is that of an agent. ``is_ours``: nothing was
    learned of the server, as something was missing on this host: descriptors, say.
    """

    is_good: bool
    why: str
    took_s: float
    advice: Advice | None = None
    is_ours: bool = False


class Probe(Protocol):
    """One check under way. Owns its descriptors and processes."""

    def cancel(self) -> None:
        """Close and end everything; ``done`` is not called. Without effect after the end."""


@dataclass(frozen=True, slots=True)
class Aim:
    """Where a check goes, and which way: the one that clients take.

    ``target`` has the port that the check is for; sockets are made by ``how`` and bound to
    ``source``. ``server`` is the server as configured.
    """

    target: Target
    how: How
    source: SockAddr | None
    server: str


class Begin(Protocol):
    """How one kind of check is begun: the function ``begin`` of its module in ``probes``."""

    def __call__(
        self, check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]
    ) -> Probe:
        """Begin a check. Never blocks and raises nothing: an error of the system is an outcome.

        ``done`` is called exactly once, never before this has returned, and at most
        ``check.timeout_s`` after it; everything is closed by then.
        """
