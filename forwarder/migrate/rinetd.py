"""rinetd.conf to a draft: our own reader reads it; here are the comments, and what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config import rinetd_conf
from forwarder.errors import Place
from forwarder.migrate.draft import Draft, Remark

if TYPE_CHECKING:
    from collections.abc import Callable

# A file name may hold a "#", so the comment begins behind it.
FILE_WORDS: Final = ("include", "logfile", "pidfile", "pidlogfile", "statusfile")


def read(text: str, source: str, service_port: Callable[[str, str], int]) -> Draft:
    """Read a whole file. Problems are in the draft."""
    draft = Draft()
    draft.raw = rinetd_conf.parse(text, source, draft.issues, service_port)
    for number, line in enumerate(text.split("\n"), 1):
        note_line(draft, line, Place(source, number))
    if "pid_file" not in draft.settings:
        draft.differ(
            Place(source),
            "rinetd writes /var/run/rinetd.pid by default, the forwarder no pid file",
            hint="add pid_file if something reads it",
        )
    return draft


def note_line(draft: Draft, line: str, place: Place) -> None:
    """Note the comment of a line, and which setting it is."""
    words = line.partition("#")[0].split(maxsplit=1)
    word = words[0] if words else ""
    if word in {"pidfile", "pidlogfile"}:
        draft.settings["pid_file"] = place
    elif word == "logcommon":
        draft.settings["log_format"] = place
    comment = comment_of(line, word)
    if comment:
        draft.remarks.append(Remark(place, comment))


def comment_of(line: str, word: str) -> str:
    """The comment of a line that begins with ``word``, from the # on."""
    line = line.rstrip()
    start = 0
    if word in FILE_WORDS:
        match = rinetd_conf.FILE_LINE.match(line, line.index(word) + len(word))
        start = match.end(1) if match else len(line)
    at = line.find("#", start)
    return line[at:] if at >= 0 else ""
