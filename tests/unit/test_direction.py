"""The copying direction between scripted sockets, against the only right outcome.

Nothing is lost, repeated or reordered, no wake-up is missed, and each end is reported once.
"""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.ends import seeded

from forwarder.relay.poller import READABLE, WRITABLE
from forwarder.relay.tcp.direction import Direction
from forwarder.relay.workbench import BULK_BYTES, SMALL_BYTES

if TYPE_CHECKING:
    import socket

    from forwarder.relay.workbench import Workbench

EPOLLIN, EPOLLERR, EPOLLHUP, EPOLLRDHUP = 0x1, 0x8, 0x10, 0x2000


class Source:
    """A socket that has received what the script says, and then perhaps a FIN or an RST."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.end = ""

    def recv_into(self, view: memoryview) -> int:
        count = min(len(view), len(self.waiting))
        if count:
            view[:count] = self.waiting[:count]
            del self.waiting[:count]
            return count
        if self.end == "reset":
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        if self.end == "fin":
            return 0
        raise BlockingIOError


class Sink:
    """A socket with room for ``room`` bytes, which may break."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.room = 0
        self.is_broken = False

    def send(self, data: memoryview) -> int:
        if self.is_broken:
            raise BrokenPipeError(errno.EPIPE, "broken")
        count = min(len(data), self.room)
        if not count:
            raise BlockingIOError
        self.room -= count
        self.taken += data[:count]
        return count


class FakeSession:
    """What a direction tells its session."""

    def __init__(self) -> None:
        self.active_at = 0.0
        self.told: list[str] = []

    def on_eof(self, direction: Direction) -> None:
        direction.stop()
        self.told.append("eof")

    def on_reset(self, direction: Direction, err: OSError) -> None:
        assert err.errno == errno.ECONNRESET
        direction.stop()
        self.told.append("reset")

    def can_rest(self, err: OSError) -> bool:
        return err.errno == errno.ENOMEM

    def on_undeliverable(self, direction: Direction, err: OSError) -> None:
        assert err.errno == errno.EPIPE
        direction.stop()
        self.told.append("undeliverable")

    def on_broken_while_blocked(self, direction: Direction) -> None:
        assert direction.is_blocked

    def on_bug(self) -> None:
        raise AssertionError


class Stage:
    """A direction between a source and a sink, and the events an edge-triggered poll would give."""

    def __init__(self) -> None:
        self.source = Source()
        self.sink = Sink()
        self.session = FakeSession()
        self.again: list[Direction] = []
        buffer = memoryview(bytearray(BULK_BYTES))
        bench = SimpleNamespace(
            poller=SimpleNamespace(now=0.0, call_again=self.again.append),
            bulk_view=buffer,
            small_view=buffer[:SMALL_BYTES],
        )
        self.direction = self._direction(bench)
        self.direction.reverse = reverse = self._direction(bench)
        reverse.reverse = self.direction
        reverse.end()
        self.direction.src = cast("socket.SocketType", self.source)
        self.direction.dst = cast("socket.SocketType", self.sink)

    def _direction(self, bench: SimpleNamespace) -> Direction:
        return Direction(cast("Workbench", bench), self.session)

    def arrive(self, data: bytes) -> None:
        """Bytes arrive: an edge."""
        self.source.waiting += data
        self.direction.on_events(EPOLLIN)

    def end(self, how: str) -> None:
        """A FIN or an RST arrives: an edge."""
        self.source.end = how
        mask = EPOLLIN | EPOLLRDHUP
        self.direction.on_events(mask if how == "fin" else mask | EPOLLERR | EPOLLHUP)

    def make_room(self, count: int) -> None:
        """The sink takes more. An edge comes only if it was full before."""
        was_full = not self.sink.room
        self.sink.room += count
        if was_full:
            self.direction.reverse.on_events(WRITABLE)

    def touch_sink(self) -> None:
        """Something arrives at the sink's socket: its edge says that it is writable, too."""
        if self.sink.room:
            self.direction.reverse.on_events(WRITABLE)

    def turn(self) -> None:
        """One turn of the poller: those that used up their budget go on."""
        again = self.again[:]
        self.again.clear()
        for direction in again:
            direction.on_turn()


SIZES = st.one_of(
    st.integers(1, 100),
    st.sampled_from([SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, BULK_BYTES, 3 << 20]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), SIZES),
        st.tuples(st.just("room"), SIZES),
        st.tuples(st.just("turn"), st.just(0)),
        st.tuples(st.just("touch"), st.just(0)),
        st.tuples(st.just("connect"), st.just(0)),
        st.tuples(st.just("break"), st.just(0)),
    ),
    max_size=25,
)
BULK = [("connect", 0), ("room", 64 << 20), ("arrive", 48 << 20)]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(STEPS, st.sampled_from(["fin", "reset"]))
@example([*BULK, *[("touch", 0), ("turn", 0)] * 4], "fin")
def test_everything_arrives_once_in_order_and_the_end_is_told_once(
    steps: list[tuple[str, int]], end: str
) -> None:
    stage = Stage()
    sent = bytearray()
    for number, (step, size) in enumerate(steps):
        if step == "arrive":
            data = seeded(min(size, 4096), number) * (size // min(size, 4096) + 1)
            sent += data[:size]
            stage.arrive(data[:size])
        elif step == "room":
            stage.make_room(size)
        elif step == "turn":
            stage.turn()
        elif step == "touch":
            stage.touch_sink()
        elif step == "connect":
            stage.direction.resume()
        elif step == "break":
            stage.sink.is_broken = True
        assert sent.startswith(stage.sink.taken)
        assert stage.direction.moved <= len(stage.sink.taken) + BULK_BYTES, "memory is not bounded"
    stage.end(end)
    stage.direction.resume()
    stage.make_room(len(sent) + 1)
    while stage.again:
        stage.turn()
    if stage.sink.is_broken and stage.session.told == ["undeliverable"]:
        return
    assert stage.session.told == ["eof" if end == "fin" else "reset"]
    assert stage.sink.taken == sent


def test_a_direction_is_queued_once_however_often_it_is_woken() -> None:
    """Events of the sink's socket (its other direction is bulk, too) wake it before its turn.

    *Result*: it does not collect several turns per round, which others would wait for.
    """
    stage = Stage()
    for step, size in BULK:
        if step == "connect":
            stage.direction.resume()
        elif step == "room":
            stage.make_room(size)
        else:
            stage.arrive(bytes(size))
    for _ in range(6):
        stage.touch_sink()
        stage.turn()
        assert len(stage.again) <= 1


def test_nothing_is_read_before_the_destination_is_connected() -> None:
    stage = Stage()
    stage.arrive(b"early")
    assert stage.direction.missed & READABLE
    assert stage.source.waiting == b"early"
    stage.make_room(10)
    stage.direction.resume()
    assert stage.sink.taken == b"early"


def test_directions_share_what_is_the_same_for_all() -> None:
    """A number of its own for each would be 64 bytes more in every open session."""
    assert Stage().direction.read_on is Stage().direction.read_on
