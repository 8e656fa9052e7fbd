"""When a certificate ends: the one field of it that matters here (X.509, RFC 5280). Pure.

The ssl module takes a certificate apart only if it has verified it, which checks mostly do not.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

# Tags of DER, X.690.
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_GENERAL_TIME: Final = 0x18
_DAY_S: Final = 86400


def ends_at(der: bytes) -> float | None:
    """When it ends, in seconds since 1970; None if it cannot be read."""
    try:
        certificate, _ = _contents(memoryview(der), _SEQUENCE)
        fields, _ = _contents(certificate, _SEQUENCE)
        if fields[0] == _VERSION:
            _, fields = _contents(fields, _VERSION)
        for _ in range(3):  # the serial number, the algorithm, the issuer
            _, fields = _contents(fields, fields[0])
        validity, _ = _contents(fields, _SEQUENCE)
        _, end = _contents(validity, validity[0])
        text, _ = _contents(end, end[0])
        return _seconds(end[0], bytes(text).decode("ascii"))
    except (IndexError, ValueError):
        return None


def remark(der: bytes | None, now: float) -> str:
    """What to say of a certificate in a status; "" if there is nothing to say."""
    end = ends_at(der) if der else None
    if end is None:
        return ""
    days = int((end - now) // _DAY_S)
    if days < 0:
        return f"its certificate ended {-days} days ago"
    return f"its certificate ends in {days} days"


def _contents(data: memoryview, tag: int) -> tuple[memoryview, memoryview]:
    """What is in the first element, and what follows it. Raises ValueError, IndexError."""
    if data[0] != tag:
        raise ValueError("another element")
    length, at = data[1], 2
    if length & 0x80:
        at += length & 0x7F
        length = int.from_bytes(data[2:at], "big")
    end = at + length
    if end > len(data):
        raise ValueError("cut off")
    return data[at:end], data[end:]


def _seconds(tag: int, text: str) -> float:
    """A point in time. Raises ValueError."""
    if tag == _UTC_TIME:
        # Two digits of the year: up to 49 is this century (RFC 5280 4.1.2.5.1).
        text = ("20" if text < "5" else "19") + text
    elif tag != _GENERAL_TIME:
        raise ValueError("no time")
    if len(text) != len("YYYYMMDDhhmmssZ"):
        raise ValueError("no time")
    month, day, hour, minute, second = (int(text[at : at + 2]) for at in range(4, 14, 2))
    # The year 9999 is "never" by RFC 5280 4.1.2.5. strptime would load a module.
    return datetime(int(text[:4]), month, day, hour, minute, second, tzinfo=UTC).timestamp()
