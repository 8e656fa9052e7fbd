"""What can go wrong, sorted by who has to act, and how the program reports it to its caller.

Why a session ends is data, not an exception: see ``stats.reasons``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

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
