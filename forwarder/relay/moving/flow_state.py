"""What a flow holds when it leaves its worker, beside its sockets: a value. Pure.

A part is numbers, for its parcel; the datagrams and bytes are one piece, for a memory file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.relay.moving.parcel import read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.relay.moving.parcel import Json

_LENGTH: Final = struct.Struct("=I")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowState:
    """``c2u``, ``u2c``: what was read and not sent, see ``FlowDirection.held``.

    ``asked``: what an upstream on trial has got and not answered; None: it is not on trial.
    ``rest``: the beginning of a frame of a stream. ``is_detached``: it will take another upstream;
    ``refusal``: the error that its upstream was reported with, if that was not handled yet.
    """

    c2u: tuple[bytes, ...] = ()
    u2c: tuple[bytes, ...] = ()
    asked: tuple[bytes, ...] | None = None
    rest: bytes = b""
    is_detached: bool = False
    refusal: int = 0

    def as_json(self) -> dict[str, object]:
        """All but :meth:`as_bytes`."""
        return {
            "holds": [len(self.c2u), len(self.u2c), len(self.asked or ())],
            "is_on_trial": self.asked is not None,
            "is_detached": self.is_detached,
            "refusal": self.refusal,
        }

    def as_bytes(self) -> bytes:
        """All that is bytes; none if there is nothing."""
        pieces = [*self.c2u, *self.u2c, *(self.asked or ())]
        if not pieces and not self.rest:
            return b""
        return b"".join(part for one in pieces for part in (_length(one), one)) + self.rest

    @classmethod
    def of(cls, content: Json, held: bytes) -> FlowState:
        """The same again, of both. Raises ValueError for nonsense."""
        counts = content.get("holds")
        if not isinstance(counts, list) or len(counts) != 3:
            raise ValueError("not what a flow holds")
        if not all(type(count) is int and 0 <= count <= len(held) for count in counts):
            raise ValueError("not what a flow holds")
        is_on_trial = read(content, "is_on_trial", False)
        pieces = _pieces(memoryview(held), sum(counts))
        c2u, u2c, asked = (tuple(next(pieces) for _ in range(count)) for count in counts)
        return cls(
            c2u=c2u,
            u2c=u2c,
            asked=asked if is_on_trial else None,
            rest=next(pieces),
            is_detached=read(content, "is_detached", False),
            refusal=read(content, "refusal", 0),
        )


def _length(piece: bytes) -> bytes:
    return _LENGTH.pack(len(piece))


def _pieces(held: memoryview, count: int) -> Iterator[bytes]:
    """So many pieces, then what is behind them. Raises ValueError."""
    at = 0
    for _ in range(count):
        start = at + _LENGTH.size
        if start > len(held):
            raise ValueError("not what a flow holds")
        at = start + _LENGTH.unpack_from(held, at)[0]
        if at > len(held):
            raise ValueError("not what a flow holds")
        yield bytes(held[start:at])
    yield bytes(held[at:])
