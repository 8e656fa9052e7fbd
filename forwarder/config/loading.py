"""From a file to a checked configuration. See ``pairs`` for addresses of the command line.

The only module of the configuration that touches the system: it reads the file and looks up service
names. Prints nothing, ends nothing, keeps nothing between two calls.
"""

from __future__ import annotations

import socket
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forwarder.config import rinetd_conf, toml_conf
from forwarder.config.likeness import Likeness, likeness
from forwarder.config.model import Config, Dialect
from forwarder.config.raw import Issues
from forwarder.config.resolve import resolve
from forwarder.errors import ConfigError, Issue, Place

if TYPE_CHECKING:
    from pathlib import Path

# Several hundred thousand rules fit; it is there for the device or log file given by mistake.
MAX_FILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that can be used, and what its author should know about it."""

    config: Config
    warnings: tuple[Issue, ...]
    dialect: Dialect = Dialect.TOML


def load(path: Path, *, dialect: Dialect | None = None) -> Loaded:
    """Read, check and complete a configuration file.

    ``dialect`` None goes by the name: ``.toml`` is TOML, anything else rinetd.conf.
    Raises ConfigError with every problem found. Blocks on the file system only.
    """
    dialect = dialect or Dialect.of(path)
    source, data = str(path), read_bytes(path)
    if dialect is Dialect.TOML:
        return parse(text_of(source, data), source, dialect)
    text, notes = text_with_comments(source, data)
    loaded = parse(text, source, dialect)
    return replace(loaded, warnings=(*notes, *loaded.warnings))


def parse(text: str, source: str, dialect: Dialect) -> Loaded:
    """Like ``load``, for a text that is already here; ``source`` names it in messages."""
    issues = Issues()
    if dialect is Dialect.TOML:
        raw = toml_conf.parse(text, source, issues)
    else:
        raw = rinetd_conf.parse(text, source, issues, socket.getservbyname)
    config = resolve(raw, source, issues)
    try:
        return Loaded(config, issues.finish(), dialect)
    except ConfigError:
        _refuse_language(text, source, dialect)
        raise


def _refuse_language(text: str, source: str, dialect: Dialect) -> None:
    """Raise ConfigError if a text looks like another language: one problem, not one per line."""
    seen = likeness(text)
    expected = Likeness.TOML if dialect is Dialect.TOML else Likeness.RINETD
    if seen is None or seen is expected:
        return
    if seen in (Likeness.TOML, Likeness.RINETD):
        other = Dialect.TOML if seen is Likeness.TOML else Dialect.RINETD
        hint = f"--format {other.value}" + (
            ", or a name that ends in .toml" if other is Dialect.TOML else ""
        )
    else:
        hint = "`forwarder convert` reads the YAML of rinetd-uv"
    what = f"looks like {seen.value}, and is read as {expected.value}"
    raise _problem(source, what, hint=hint) from None


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ConfigError for anything that is not a text."""
    return text_of(str(path), read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file. Raises ConfigError for anything that is not one."""
    source = str(path)
    try:
        # Opening a pipe without a writer would block forever.
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise _problem(source, f"is {kind}", hint="name the configuration file itself")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise _problem(source, "does not exist", hint="check the name") from None
    except PermissionError:
        hint = "let the user that runs the program read it"
        what = "cannot read the file: permission denied"
        raise ConfigError([Issue(Place(source), what, hint=hint)]) from None
    except (OSError, ValueError) as error:
        raise _problem(source, f"cannot be read: {error}") from None


def text_of(source: str, data: bytes) -> str:
    """Decode the contents of a file. Raises ConfigError for anything that is not a text."""
    if len(data) > MAX_FILE_BYTES:
        what = f"is longer than {MAX_FILE_BYTES // 1024**2} MiB"
        raise _problem(source, what, hint="this is hardly a configuration")
    if not data.strip():
        raise _problem(source, "is empty", hint="write at least one forwarding rule")
    nul = data.find(b"\0")
    if nul >= 0:
        raise _problem_at(source, data, nul, "a NUL byte")
    try:
        # Editors of other systems put a byte order mark first.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # What the decoder counts from does not include the mark.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise _problem_at(source, data, offset, f"byte 0x{data[offset]:02x} is not UTF-8") from None


def text_with_comments(source: str, data: bytes) -> tuple[str, list[Issue]]:
    """As ``text_of``, but a comment of rinetd.conf may be written in another encoding.

    What is behind a # and not UTF-8 is taken for Latin-1; the second value is a warning of that.
    """
    lines, places = data.split(b"\n"), []
    for number, line in enumerate(lines):
        statement, sign, comment = line.partition(b"#")
        if sign and not _is_utf8(comment):
            lines[number] = statement + sign + comment.decode("latin-1").encode()
            places.append(Place(source, number + 1, len(statement) + 1))
    if not places:
        return text_of(source, data), []
    more = f", and {len(places) - 1} more" if len(places) > 1 else ""
    what = f"this comment{more} is not UTF-8; read as Latin-1"
    note = Issue(places[0], what, hint="save the file as UTF-8", is_warning=True)
    return text_of(source, b"\n".join(lines)), [note]


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _problem_at(source: str, data: bytes, offset: int, what: str) -> ConfigError:
    line_start = data.rfind(b"\n", 0, offset) + 1
    place = Place(source, data.count(b"\n", 0, offset) + 1, offset - line_start + 1)
    what = f"{what} (byte {place.column} of line {place.line})"
    return ConfigError([Issue(place, what, "text in UTF-8", "save the file as UTF-8")])


def _problem(source: str, what: str, *, hint: str = "") -> ConfigError:
    return ConfigError([Issue(Place(source), f"the file {what}", hint=hint)])
