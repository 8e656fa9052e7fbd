"""What two ends of a connection do, what they see of it, and what TCP says they must see. Pure.

A dialogue is two scripts that run at the same time. What was seen is judged by laws that hold for
every carrier: a direct connection (which proves the laws), the forwarder, and others like it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES: Final = 4 << 20
"""The most that one end says in a dialogue: more than all buffers on the way hold."""


# -- scripts


@dataclass(frozen=True, slots=True)
class Send:
    """Say ``count`` bytes more, in sends of ``piece``; the script goes on meanwhile."""

    count: int
    piece: int = 1 << 18


@dataclass(frozen=True, slots=True)
class Read:
    """Read ``count`` bytes, ``piece`` at a time with a pause after each, or to the end."""

    count: int
    piece: int = 1 << 18
    pause_ms: int = 0


@dataclass(frozen=True, slots=True)
class ReadAll:
    """Read to the end."""

    piece: int = 1 << 18
    pause_ms: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for a while; what is there to be read is not."""

    ms: int


@dataclass(frozen=True, slots=True)
class HalfClose:
    """End the own stream, after what is still to be said; the script goes on meanwhile."""


@dataclass(frozen=True, slots=True)
class Linger:
    """Wait until the other side's system has all that was said, FIN included, or it stalls."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close; what the system has not taken yet is never said."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Close by a reset."""


@dataclass(frozen=True, slots=True)
class Meet:
    """Wait for the other end to come to its own next meeting, or to have none any more."""


Op = Send | Read | ReadAll | Pause | HalfClose | Linger | Close | Reset | Meet
Script = tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Buffers:
    """SO_RCVBUF and SO_SNDBUF of an end in bytes; 0 is the system's."""

    receive: int = 0
    send: int = 0


@dataclass(frozen=True)
class Dialogue:
    """What both ends do. An end that does not close in its script half-closes, reads, closes."""

    client: Script
    upstream: Script
    client_buffers: Buffers = Buffers()
    upstream_buffers: Buffers = Buffers()

    def script(self, number: int) -> Script:
        """The script of end 0, the client's, or 1, with its end."""
        ops = (self.client, self.upstream)[number]
        if ops and isinstance(ops[-1], Close | Reset):
            return ops
        ended = any(isinstance(op, HalfClose) for op in ops)
        return (*ops, *(() if ended else (HalfClose(),)), ReadAll(), Close())

    def buffers(self, number: int) -> Buffers:
        """Those of an end."""
        return (self.client_buffers, self.upstream_buffers)[number]

    def mirrored(self) -> Dialogue:
        """The same with the parts exchanged."""
        return Dialogue(self.upstream, self.client, self.upstream_buffers, self.client_buffers)

    def pauses_s(self) -> float:
        """How long it is silent on purpose; a little longer if reads bring less than a piece."""
        ends = ((self.client, self.upstream), (self.upstream, self.client))
        return sum(_pauses_ms(op, _said(other)) for mine, other in ends for op in mine) / 1000

    def kernel_delays_s(self) -> float:
        """By how much the kernel may prolong it, by chance: each pause may count twice.

        What does not fit into a small receive buffer is dropped or not sent, and tried again by a
        timer that doubles (RFC 6298, 5.5; RFC 9293, 3.8.6.1). A reader that comes back after 6.5 s
        finds the next try just done or just ahead, and gets the rest at once or after 6.5 s more.
        """
        return self.pauses_s()

    def as_code(self) -> str:
        """Itself as Python, without defaults."""
        parts = [f"    client={_script_code(self.client)},"]
        parts += [f"    upstream={_script_code(self.upstream)},"]
        for name in ("client_buffers", "upstream_buffers"):
            if (buffers := getattr(self, name)) != Buffers():
                parts.append(f"    {name}={_code(buffers)},")
        return "\n".join(["Dialogue(", *parts, ")"])


def _said(script: Script) -> int:
    """How many bytes an end says in all."""
    return sum(op.count for op in script if isinstance(op, Send))


def _pauses_ms(op: Op, there: int) -> int:
    """The pauses of one operation, at an end that is told ``there`` bytes in all."""
    if isinstance(op, Pause):
        return op.ms
    if not isinstance(op, Read | ReadAll):
        return 0
    count = min(op.count, there) if isinstance(op, Read) else there
    return -(-count // op.piece) * op.pause_ms


def _code(value: Op | Buffers) -> str:
    given = []
    for name, one in type(value).__dataclass_fields__.items():
        found = getattr(value, name)
        if found != one.default:
            given.append(f"{name}={found}")
    return f"{type(value).__name__}({', '.join(given)})"


def _script_code(script: Script) -> str:
    return f"({', '.join(map(_code, script))}{',' if len(script) == 1 else ''})"


# -- what was seen


@dataclass
class Seen:
    """What one end has seen and done."""

    sent: int = 0
    """Bytes that its system has taken."""
    received: int = 0
    read_end: str = ""
    """``eof``, ``reset``, or nothing: it has not read that far."""
    write_end: str = ""
    """The error that ended its sending."""
    wrong_at: int = -1
    """Where in the stream it got something else than was said."""
    fin: bool = False
    """Its stream has ended by FIN after all that was sent."""
    fin_acked: bool = False
    """The other side's system had all of it, FIN included, when this end went away."""
    acked: bool = False
    """The other side's system had all that was sent when this end went away."""
    cut: bool = False
    """It went away by RST: by choice, or with input that it had not read."""
    gone: bool = False
    """It has closed."""
    closed: bool = False
    """It has closed before it had read to the end."""
    stuck: str = ""
    """What it was doing when the dialogue was given up."""


@dataclass
class Outcome:
    """What came of a dialogue: the client's and the upstream's view."""

    client: Seen = field(default_factory=Seen)
    upstream: Seen = field(default_factory=Seen)
    took_s: float = 0.0

    def pair(self, reader: int) -> tuple[Seen, Seen]:
        """The view of one end and of the other."""
        return (self.client, self.upstream) if reader == 0 else (self.upstream, self.client)


@dataclass(frozen=True)
class Carrier:
    """What the laws must know of the way that a dialogue went."""

    name: str
    unix: tuple[bool, bool] = (False, False)
    """Whether the client's and the upstream's connection are unix sockets."""


# -- laws


def complaints(outcome: Outcome, carrier: Carrier) -> list[str]:
    """Which laws an outcome breaks."""
    found = []
    for reader, name in enumerate(("client", "upstream")):
        mine, other = outcome.pair(reader)
        unix, other_unix = carrier.unix[reader], carrier.unix[1 - reader]
        said = [law(mine, other, unix, other_unix) for law in _LAWS]
        found += [f"{name}: {text}" for text in said if text]
    return found


def _ended(mine: Seen, _other: Seen, _unix: bool, _other_unix: bool) -> str:
    """Nobody waits for ever."""
    return f"waits for ever in {mine.stuck}" if mine.stuck else ""


def _order(mine: Seen, other: Seen, _unix: bool, _other_unix: bool) -> str:
    """A stream arrives in order, once, and nothing else does (RFC 9293, 1: reliable, in order)."""
    if mine.wrong_at >= 0:
        return f"other bytes than were sent, from {mine.wrong_at} on"
    if mine.received > other.sent:
        return f"{mine.received} bytes of {other.sent}"
    return ""


def _whole(mine: Seen, other: Seen, _unix: bool, other_unix: bool) -> str:
    """A stream that ended by FIN arrives whole, and as ended, whatever is said or done after.

    RFC 9293, 3.6: a FIN is in the stream, behind the last byte. Directly it is safe as soon as the
    reader's system has acknowledged it, or nothing comes that a closed socket answers by a reset.
    """
    if mine.closed or mine.stuck or not other.fin:
        return ""
    spoken_to = mine.sent > other.received or bool(mine.write_end)
    safe = other.fin_acked if not other_unix else not other.cut
    if not safe and (other.cut or spoken_to):
        return ""
    if mine.received == other.sent and mine.read_end == "eof":
        return ""
    return f"{mine.received} of {other.sent} bytes that ended by FIN, then {mine.read_end!r}"


def _cut(mine: Seen, other: Seen, unix: bool, other_unix: bool) -> str:
    """What was cut does not look whole; what had arrived before the cut is read before it."""
    if mine.closed or mine.stuck:
        return ""
    if mine.read_end == "eof" and not unix:
        if not other.fin:
            return f"an end of file after {mine.received} bytes, but it was cut"
        if mine.received < other.sent:
            return f"an end of file after {mine.received} of {other.sent} bytes"
    had_arrived = other.cut and not other.fin and other.acked and not other_unix
    if had_arrived and mine.received < other.sent:
        return f"{mine.received} of {other.sent} bytes that had arrived before the reset"
    return ""


def _innocent(mine: Seen, other: Seen, _unix: bool, _other_unix: bool) -> str:
    """Nobody hears of a reset that the other side gave no cause for."""
    heard = mine.read_end == "reset" or mine.write_end
    if mine.stuck or other.stuck or not heard or other.cut:
        return ""
    if other.gone and (mine.sent > other.received or mine.write_end):
        return ""  # what comes to a closed socket is answered by a reset
    return f"{mine.read_end or mine.write_end!r} without a cause"


_LAWS: Final = (_ended, _order, _whole, _cut, _innocent)


def differences(direct: Outcome, here: Outcome, carrier: Carrier) -> list[str]:
    """What an end saw otherwise than directly, where the laws leave no choice in either case.

    They do leave one, and a difference is allowed:

    - how many bytes a sender's system takes before it stalls, or before it learns that nobody
      reads: there are more buffers on the way. So what is compared is whether all came that did go;
    - how much of a stream arrives that is cut before all of it was acknowledged;
    - whether a FIN that nobody has acknowledged is overtaken by a reset, when its sender has closed
      and is spoken to;
    - an end of file in place of a reset at a unix socket, which knows no resets (unix(7));
    - when things happen.
    """
    found = []
    for reader, name in enumerate(("client", "upstream")):
        views = [_settled(outcome, reader, carrier) for outcome in (direct, here)]
        if None not in views and views[0] != views[1]:
            found.append(f"{name}: directly {views[0]}, here {views[1]}")
    return found


def _settled(outcome: Outcome, reader: int, carrier: Carrier) -> tuple[object, ...] | None:
    """What an end saw, None if the laws would have let it see something else."""
    mine, other = outcome.pair(reader)
    open_ended = other.fin and not other.fin_acked and (other.gone or other.cut)
    if mine.closed or mine.stuck or open_ended or (other.cut and not other.acked):
        return None
    if other.cut and any(carrier.unix):
        return None
    return (mine.received == other.sent, mine.read_end)


# -- smaller dialogues, of which one may show the same


def smaller(dialogue: Dialogue) -> Iterator[Dialogue]:
    """Dialogues that are simpler in one point, the simplest first."""
    if dialogue.client_buffers != Buffers():
        yield replace(dialogue, client_buffers=Buffers())
    if dialogue.upstream_buffers != Buffers():
        yield replace(dialogue, upstream_buffers=Buffers())
    for index in range(len(dialogue.client)):
        for script in _simpler(dialogue.client, index):
            yield replace(dialogue, client=script)
    for index in range(len(dialogue.upstream)):
        for script in _simpler(dialogue.upstream, index):
            yield replace(dialogue, upstream=script)


def _simpler(script: Script, index: int) -> Iterator[Script]:
    before, op, after = script[:index], script[index], script[index + 1 :]
    yield before + after
    for simple in _simpler_op(op):
        yield (*before, simple, *after)


def _simpler_op(op: Op) -> Iterator[Op]:
    default = 1 << 18
    if isinstance(op, Send | Read):
        if op.piece != default:
            yield replace(op, piece=default)
        for count in (1, 1000, 100_000, op.count // 2, _round(op.count)):
            if 0 < count < op.count:
                yield replace(op, count=count)
    if isinstance(op, Read | ReadAll) and op.pause_ms:
        yield replace(op, pause_ms=0)
    if isinstance(op, ReadAll) and op.piece != default:
        yield replace(op, piece=default)
    if isinstance(op, Pause) and op.ms > 1:
        yield replace(op, ms=op.ms // 2)


def _round(count: int) -> int:
    unit = int("1" + "0" * (len(str(count)) - 1))
    return count // unit * unit
