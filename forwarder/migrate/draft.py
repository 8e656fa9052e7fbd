"""What was read of another program's configuration, on its way to our format. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from forwarder.config.raw import Issues, RawConfig

if TYPE_CHECKING:
    from forwarder.config.model import LogPlace
    from forwarder.errors import Place

LEFT_OUT: Final = "# left out: "


@dataclass(frozen=True, slots=True)
class Remark:
    """A comment, from the ``#`` on, and where it stood."""

    place: Place
    text: str


@dataclass(slots=True)
class Draft:
    """A configuration as the other program means it, in our terms, and what comes with it.

    ``remarks`` are comments; ``gaps`` stand for statements outside of rules that have no equivalent
    here. ``settings`` says where settings stand, by their key here. ``ends`` has the last position
    of what takes several lines, by its first. ``order`` counts the lines of several files in the
    order they are read; without it the number of the line is the position.
    """

    issues: Issues = field(default_factory=Issues)
    raw: RawConfig = field(default_factory=RawConfig)
    remarks: list[Remark] = field(default_factory=list)
    gaps: list[Remark] = field(default_factory=list)
    settings: dict[str, Place] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    order: dict[tuple[str, int], int] = field(default_factory=dict)

    def position(self, place: Place) -> int:
        """Where a place stands among all that was read, from 1."""
        return self.order.get((place.source, place.line), place.line)

    def set_pid_file(self, name: str, place: Place) -> None:
        """Set the pid file."""
        self.raw.settings = replace(self.raw.settings, pid_file=name)
        self.settings["pid_file"] = place

    def set_log(self, log: LogPlace) -> None:
        """Set the place of the connection log."""
        self.raw.settings = replace(self.raw.settings, logs=(log,))

    def leave_out(self, place: Place, written: str, why: str, *, in_rule: bool = False) -> None:
        """Note that something has no equivalent here, in the report and in the text."""
        self.issues.warn(place, f"{written} is left out: {why}")
        gap = Remark(place, LEFT_OUT + written)
        (self.remarks if in_rule else self.gaps).append(gap)

    def differ(self, place: Place, what: str, *, hint: str = "") -> None:
        """Note that something means something else here."""
        self.issues.warn(place, what, hint=hint)
