"""Values of groups and their checks as people write them: bytes, patterns, codes, parts. Pure.

Each parser takes what a file has, and raises ValueError that says what is wrong with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.config.durations import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

BYTES_FORMS: Final = r"a text, in which \r, \n, \t, \\ and \xNN stand for bytes"
EXPECT_FORMS: Final = rf'{BYTES_FORMS}; or "re:" and a regular expression'
STATUS_FORMS: Final = 'codes of HTTP from 100 to 599 and ranges of them, such as "200-299,401"'
PREFIX_FORMS: Final = 'bits of an IPv4 and of an IPv6 address, such as "24/56"'
COMMAND_FORMS: Final = 'a list of texts, the first an absolute path: ["/usr/bin/check", "ARGUMENT"]'
START_FORMS: Final = '"up" or "down"'

# An answer is looked at in its first 16 KiB; what asks for it is shorter. Arbitrary.
MOST_BYTES: Final = 4096
_MOST_ARGUMENTS: Final = 100

_ESCAPE: Final = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|(.?))", re.DOTALL)
_ESCAPED: Final = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}
_CODES: Final = re.compile(r"[ ]*([1-5][0-9][0-9])(?:[ ]*-[ ]*([1-5][0-9][0-9]))?[ ]*", re.ASCII)
_PREFIXES: Final = re.compile(r"([0-9]{1,2})/([0-9]{1,3})", re.ASCII)
_PERCENT: Final = re.compile(r"([0-9]{1,3})[ ]?%", re.ASCII)
_PATTERN: Final = "re:"


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer has to contain: bytes, or a regular expression that is found in it."""

    text: bytes
    is_pattern: bool = False


def parse_bytes(value: object) -> bytes:
    """Read bytes that are sent."""
    if not isinstance(value, str):
        raise ValueError("is not a text")  # noqa: TRY004 - one kind of error for the caller
    return _within(_ESCAPE.sub(_unescaped, value.encode()))


def _within(data: bytes) -> bytes:
    if not data:
        raise ValueError("is empty")
    if len(data) > MOST_BYTES:
        raise ValueError(f"is {len(data)} bytes long, and may be {MOST_BYTES}")
    return data


def _unescaped(found: re.Match[bytes]) -> bytes:
    if found[1]:
        return bytes.fromhex(found[1].decode())
    try:
        return _ESCAPED[found[2]]
    except KeyError:
        raise ValueError(f"has {found[0].decode(errors='replace')!r} in it") from None


def parse_expected(value: object) -> Expected:
    """Read what an answer has to contain."""
    if not isinstance(value, str) or not value.startswith(_PATTERN):
        return Expected(parse_bytes(value))
    pattern = _within(value.removeprefix(_PATTERN).encode())
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return Expected(pattern, is_pattern=True)


def show_bytes(data: bytes) -> str:
    """Bytes as a file has them."""
    return "".join(map(_shown, data))


def _shown(byte: int) -> str:
    if byte == ord("\\"):
        return "\\\\"
    if 32 <= byte < 127:
        return chr(byte)
    return {13: "\\r", 10: "\\n", 9: "\\t"}.get(byte, f"\\x{byte:02x}")


def show_expected(expected: Expected) -> str:
    """What an answer has to contain, as a file has it."""
    if expected.is_pattern:
        return _PATTERN + expected.text.decode(errors="backslashreplace")
    shown = show_bytes(expected.text)
    return f"\\x72{shown[1:]}" if shown.startswith(_PATTERN) else shown


def parse_status(value: object) -> tuple[tuple[int, int], ...]:
    """Read codes and ranges of them: the first and the last of each."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("is not a list of codes")  # noqa: TRY004 - one kind of error
    found = []
    for part in str(value).split(","):
        match = _CODES.fullmatch(part)
        if match is None:
            raise ValueError("is not a list of codes")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"has a range that ends before it begins: {part.strip()}")
        found.append((first, last))
    return tuple(found)


def show_status(status: tuple[tuple[int, int], ...]) -> str:
    """Codes as a file has them."""
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in status)


def parse_prefixes(value: object) -> tuple[int, int]:
    """Read how many bits of an address count."""
    match = _PREFIXES.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is not two numbers of bits")
    v4, v6 = int(match[1]), int(match[2])
    if not (1 <= v4 <= 32 and 1 <= v6 <= 128):
        raise ValueError("is not from 1/1 to 32/128")
    return v4, v6


def show_prefixes(prefixes: tuple[int, int]) -> str:
    """Bits as a file has them."""
    return "{}/{}".format(*prefixes)


def parse_command(value: object) -> tuple[str, ...]:
    """Read a command and its arguments."""
    if not isinstance(value, list) or not value or len(value) > _MOST_ARGUMENTS:
        raise ValueError(f"is not a list of 1 to {_MOST_ARGUMENTS} texts")
    if not all(isinstance(part, str) and "\0" not in part for part in value):
        raise ValueError("has an element that is not a text")
    if not value[0].startswith("/"):
        raise ValueError(f"begins with {value[0][:80]!r}, which is not an absolute path")
    return tuple(value)


def percent(most: int) -> Callable[[object], int]:
    """What reads a number of per cent."""

    def parse(value: object) -> int:
        match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        number = int(match[1]) if match else value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
            raise ValueError(f"is not from 0 to {most} per cent")
        return number

    return parse


def percent_forms(most: int) -> str:
    """What :func:`percent` takes."""
    return f'a number of per cent from 0 to {most}, such as {most // 2} or "{most // 2}%"'


def part(most: int) -> Callable[[object], float]:
    """What reads a number of per cent as a part of 1."""
    parse = percent(most)
    return lambda value: parse(value) / 100


def between(least_s: float, most_s: float, *, or_none: bool = False) -> Callable[[object], float]:
    """What reads a duration within bounds, in seconds; ``or_none``: or 0."""

    def parse(value: object) -> float:
        found = parse_duration(value)
        if not (least_s <= found <= most_s or (or_none and found == 0)):
            raise ValueError(f"is not from {_duration(least_s)} to {_duration(most_s)}")
        return found

    return parse


def between_forms(least_s: float, most_s: float, *, or_none: bool = False) -> str:
    """What :func:`between` takes."""
    forms = f'a duration from "{_duration(least_s)}" to "{_duration(most_s)}"'
    return f"{forms}, or 0" if or_none else forms


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size:g}{unit}"
    return f"{seconds:g}s"


def parse_start(value: object) -> bool:
    """Read how a server begins: whether it is down until it has been checked."""
    if value not in ("up", "down"):
        raise ValueError("is neither of the two")
    return value == "down"
