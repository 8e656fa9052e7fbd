"""Why sessions end: the one table of reasons that counters, logs and documentation use.

Data, not exceptions: an end of a session is expected.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Who(Enum):
    """Which side ended a session."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    US = "us"


class Phase(Enum):
    """What a session was doing when it ended, or what ended it."""

    ACCEPT = "accept"
    ACCESS = "access"
    LIMIT = "limit"
    CONNECT = "connect"
    DATA = "data"
    HALF_CLOSE = "half-close"
    IDLE = "idle"
    DRAIN = "drain"
    SHUTDOWN = "shutdown"
    KILL = "kill"
    ERROR = "error"
    UPSTREAM_DOWN = "upstream-down"
    LOST = "lost"


# Every way a session can end. docs/operations.md explains each.
REASONS: Final = (
    "client/data",
    "upstream/data",
    "client/data/reset",
    "upstream/data/reset",
    "client/half-close/reset",
    "upstream/half-close/reset",
    "us/half-close",
    "us/idle",
    "client/connect/reset",
    "upstream/connect",
    "us/connect",
    "us/accept",
    "us/access",
    "us/limit",
    "us/drain",
    "us/shutdown",
    "us/kill",
    "us/upstream-down",
    "us/error",
    "us/lost",
)
_INDEX: Final = {code: index for index, code in enumerate(REASONS)}


class CloseReason:
    """Why a session ended: who ended it, in which phase, and whether one side was cut off.

    ``code`` is one of REASONS, ``index`` its place there; ``detail`` says more, for people.
    """

    __slots__ = ("code", "detail", "index", "is_reset", "phase", "who")

    def __init__(self, who: Who, phase: Phase, detail: str = "", *, is_reset: bool = False) -> None:
        """Raises KeyError for a combination that is not in the table."""
        self.who = who
        self.phase = phase
        self.detail = detail
        self.is_reset = is_reset
        self.code = f"{who.value}/{phase.value}" + ("/reset" if is_reset else "")
        self.index = _INDEX[self.code]

    def __str__(self) -> str:
        return f"{self.code} ({self.detail})" if self.detail else self.code


# One side had ended, and the other fell silent: which one had ended.
CLIENT_HAD_ENDED: Final = CloseReason(Who.US, Phase.HALF_CLOSE, "the client had ended")
UPSTREAM_HAD_ENDED: Final = CloseReason(Who.US, Phase.HALF_CLOSE, "the upstream had ended")
NOT_ALLOWED: Final = CloseReason(Who.US, Phase.ACCESS)
