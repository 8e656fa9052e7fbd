"""What can go wrong, told apart by who has to act, and how the program says it to its caller.

Expected ends of a session are data (:class:`CloseReason`), not exceptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence


class ExitCode(IntEnum):
    """Exit status of the ``forwarder`` command; the numbers are those of sysexits.h."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 69  # an address cannot be bound, or another instance runs
    INTERNAL = 70
    NO_PERMISSION = 77
    CONFIG = 78


class ForwarderError(Exception):
    """Base of all errors that end a command with a message and an exit code."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a configuration something stands.

    ``line`` and ``column`` count from 1; 0 means unknown (a whole file, a command-line flag).
    """

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        parts = [self.source]
        if self.line:
            parts.append(str(self.line))
            if self.column:
                parts.append(str(self.column))
        return ":".join(parts)


@dataclass(frozen=True, slots=True)
class Issue:
    """One problem in a configuration: where, what was found, what is allowed, what to do."""

    place: Place
    what: str
    allowed: str = ""
    hint: str = ""
    is_warning: bool = False

    def __str__(self) -> str:
        text = f"{self.place}: {'warning: ' if self.is_warning else ''}{self.what}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.hint:
            text += f"; hint: {self.hint}"
        return text


class ConfigError(ForwarderError):
    """A configuration that cannot be used. Carries every problem found, never only the first."""

    exit_code = ExitCode.CONFIG

    def __init__(self, issues: Sequence[Issue]) -> None:
        super().__init__("\n".join(map(str, issues)))
        self.issues = tuple(issues)


class RightsError(ConfigError):
    """A configuration that this process lacks the privileges for. Nothing was started."""

    exit_code = ExitCode.NO_PERMISSION


class StartupError(ForwarderError):
    """A listener cannot be made, or another instance owns the address. Nothing was started."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.UNAVAILABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Who(Enum):
    """Which side ended a session."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    US = "us"


class Phase(Enum):
    """What a session was doing when it ended, or what it was that ended it."""

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


# Every way a session can end, by its code: the one table of them. docs/operations.md explains each.
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
    "us/error",
)
_INDEX: Final = {code: index for index, code in enumerate(REASONS)}


class CloseReason:
    """Why a session ended: who ended it, in which phase, and whether one side was cut off.

    ``code`` is one of REASONS, ``index`` its place there; ``detail`` says more, for people.
    """

    __slots__ = ("code", "detail", "index", "is_reset", "phase", "who")

    def __init__(self, who: Who, phase: Phase, detail: str = "", *, is_reset: bool = False) -> None:
        """Raises KeyError for a way that is not in the table."""
        self.who = who
        self.phase = phase
        self.detail = detail
        self.is_reset = is_reset
        self.code = f"{who.value}/{phase.value}" + ("/reset" if is_reset else "")
        self.index = _INDEX[self.code]

    def __str__(self) -> str:
        return f"{self.code} ({self.detail})" if self.detail else self.code


# One side had ended and the other one said no more: which one it was.
CLIENT_HAD_ENDED: Final = CloseReason(Who.US, Phase.HALF_CLOSE, "the client had ended")
UPSTREAM_HAD_ENDED: Final = CloseReason(Who.US, Phase.HALF_CLOSE, "the upstream had ended")
NOT_ALLOWED: Final = CloseReason(Who.US, Phase.ACCESS)
