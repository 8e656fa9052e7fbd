"""How datagrams are kept apart in a stream. Pure: bytes in, bytes out.

``raw`` does not keep them apart: a datagram is whatever one read of the stream gives. ``length``
puts two bytes before each, their length, most significant first, as DNS over TCP does (RFC 1035
section 4.2.2).
"""

from __future__ import annotations

from typing import Protocol

from forwarder.config.model import Framing


class Decoder(Protocol):
    """A stream that is taken apart."""

    def feed(self, data: memoryview) -> list[bytes]:
        """Take in what was read. Returns the datagrams that are complete, as copies."""

    @property
    def rest(self) -> bytes:
        """What was taken in of a frame that is not complete; if there is any, no end is due."""


def encode(framing: Framing, content: bytes) -> bytes:
    """A datagram as it goes into the stream."""
    return content if framing is Framing.RAW else len(content).to_bytes(2, "big") + content


def decoder(framing: Framing) -> Decoder:
    """Take a stream apart, from its beginning."""
    return _Raw() if framing is Framing.RAW else _Length()


class _Raw:
    __slots__ = ()

    rest = b""

    def feed(self, data: memoryview) -> list[bytes]:
        return [bytes(data)]


class _Length:
    """Keeps at most one frame that is not complete: 65,537 bytes."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept = bytearray()

    @property
    def rest(self) -> bytes:
        return bytes(self._kept)

    def feed(self, data: memoryview) -> list[bytes]:
        kept = self._kept
        kept += data
        found = []
        at = 0
        while len(kept) - at >= 2:
            end = at + 2 + (kept[at] << 8 | kept[at + 1])
            if end > len(kept):
                break
            found.append(bytes(kept[at + 2 : end]))
            at = end
        del kept[:at]
        return found
