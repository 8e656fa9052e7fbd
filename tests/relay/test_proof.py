"""What the kernel counts of a TCP socket, in each state that a dead worker may leave one in."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from support.waiting import eventually

from forwarder.net.sockets import set_abort_on_close, waiting_bytes
from forwarder.relay.moving import proof
from forwarder.relay.moving.proof import Counts, Report, counts_of, missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack


@dataclass
class Ends:
    """A connection: ``ours`` is looked at. What was done with it, to compare."""

    ours: socket.socket
    peer: socket.socket
    has_connected: bool
    read: int = 0
    written: int = 0

    def counts(self) -> Counts | None:
        return proof.counts(self.ours, has_connected=self.has_connected)

    def take(self, count: int) -> None:
        """Read, as the worker did."""
        eventually(lambda: waiting_bytes(self.ours.fileno()) >= count)
        self.read += len(self.ours.recv(count))

    def put(self, count: int) -> None:
        """Write, as the worker did."""
        self.written += self.ours.send(bytes(count))

    def fill(self) -> None:
        """Write until the peer's window is closed and our queue is full."""
        self.ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self.put(100_000)

    def finish(self) -> None:
        self.ours.shutdown(socket.SHUT_WR)

    def hear(self, count: int, *, has_fin: bool = False) -> None:
        """Let the peer say something, and end if it ``has_fin``; all of it has come then."""
        wanted = self.total() + count + has_fin
        self.peer.sendall(bytes(count))
        if has_fin:
            self.peer.shutdown(socket.SHUT_WR)
        eventually(lambda: self.total() >= wanted)

    def total(self) -> int:
        report = proof._report(self.ours)
        assert report is not None
        return report.received

    def be_reset(self) -> None:
        set_abort_on_close(self.peer)
        self.peer.close()
        self.await_state(proof.CLOSE)

    def await_state(self, state: int) -> None:
        """Looking at it must not take an error away, as counting does."""
        eventually(lambda: self.ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == state)


def nothing(_: Ends) -> None:
    """Nobody has said anything."""


def some_read(ends: Ends) -> None:
    ends.hear(100)
    ends.take(40)
    ends.put(70)


def blocked(ends: Ends) -> None:
    ends.fill()


def ended_unread(ends: Ends) -> None:
    ends.hear(100, has_fin=True)
    ends.take(40)
    ends.put(7)
    ends.await_state(proof.CLOSE_WAIT)


def ended_read(ends: Ends) -> None:
    ended_unread(ends)
    ends.take(60)
    assert ends.ours.recv(1) == b""


def half_closed(ends: Ends) -> None:
    ends.hear(30)
    ends.put(5)
    ends.finish()
    ends.await_state(proof.FIN_WAIT2)
    ends.take(10)


def blocked_and_finished(ends: Ends) -> None:
    ends.fill()
    ends.finish()
    ends.await_state(proof.FIN_WAIT1)


def both_ending(ends: Ends) -> None:
    blocked_and_finished(ends)
    ends.hear(20, has_fin=True)
    ends.await_state(proof.CLOSING)
    ends.take(3)


def last_words_unsent(ends: Ends) -> None:
    ends.fill()
    ends.hear(20, has_fin=True)
    ends.take(20)
    assert ends.ours.recv(1) == b""
    ends.finish()
    ends.await_state(proof.LAST_ACK)


STATES = {
    one.__name__: one
    for one in (
        nothing,
        some_read,
        blocked,
        ended_unread,
        ended_read,
        half_closed,
        blocked_and_finished,
        both_ending,
        last_words_unsent,
    )
}


def over_unread(ends: Ends) -> None:
    half_closed(ends)
    ends.hear(9, has_fin=True)
    ends.await_state(proof.CLOSE)


def over_read(ends: Ends) -> None:
    over_unread(ends)
    ends.take(29)
    assert ends.ours.recv(1) == b""


def over_by_us(ends: Ends) -> None:
    ended_read(ends)
    ends.finish()
    ends.await_state(proof.CLOSE)


def reset_behind_fin(ends: Ends) -> None:
    ended_unread(ends)
    ends.be_reset()


def reset_behind_fin_all_read(ends: Ends) -> None:
    ended_read(ends)
    ends.be_reset()


def reset_unread(ends: Ends) -> None:
    some_read(ends)
    ends.be_reset()


def reset_all_read(ends: Ends) -> None:
    some_read(ends)
    ends.take(60)
    ends.be_reset()


def reset_and_noticed(ends: Ends) -> None:
    reset_all_read(ends)
    with pytest.raises(ConnectionResetError):
        ends.ours.recv(1)


OVER = {
    one.__name__: (one, has_ended)
    for one, has_ended in (
        (over_unread, True),
        (over_read, True),
        (over_by_us, True),
        (reset_behind_fin, True),
        (reset_behind_fin_all_read, True),
        (reset_unread, False),
        (reset_all_read, False),
        (reset_and_noticed, False),
    )
}


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["connected", "accepted"])
def ends(request: pytest.FixtureRequest, stack: ExitStack, host: str) -> Ends:
    """A connection in which our side has connected, or was accepted."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        connected = stack.enter_context(socket.socket(family))
        connected.connect(listener.getsockname())
        accepted, _ = listener.accept()
        stack.enter_context(accepted)
    if request.param == "connected":
        return Ends(connected, accepted, has_connected=True)
    return Ends(accepted, connected, has_connected=False)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_what_was_read_and_written_is_counted_in_each_state(
    ends: Ends, state: Callable[[Ends], None]
) -> None:
    state(ends)
    counts = ends.counts()
    assert counts is not None
    assert (counts.read, counts.written, counts.is_closed) == (ends.read, ends.written, False)


@pytest.mark.parametrize(("state", "has_ended"), OVER.values(), ids=OVER)
def test_of_a_connection_that_is_over_what_was_read_is_counted_and_whether_it_had_ended(
    ends: Ends, state: Callable[[Ends], None], has_ended: bool
) -> None:
    state(ends)
    for _ in range(2):  # looking changes nothing of that
        counts = ends.counts()
        assert counts is not None
        assert (counts.read, counts.has_ended, counts.is_closed) == (ends.read, has_ended, True)


def test_data_that_came_with_the_handshake_is_counted(stack: ExitStack, host: str) -> None:
    """TCP Fast Open, with the setting that needs no cookie where the test may change it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = stack.enter_context(socket.socket(family))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
    listener.bind((host, 0))
    listener.listen()
    for _ in range(2):  # the first asks for the cookie
        client = stack.enter_context(socket.socket(family))
        sent = client.sendto(b"early", socket.MSG_FASTOPEN, listener.getsockname())
        server, _ = listener.accept()
        stack.enter_context(server)
        assert server.recv(3) == b"ear"
        server.send(b"answer")
        assert client.recv(2) == b"an"
        ours = proof.counts(client, has_connected=True)
        theirs = proof.counts(server, has_connected=False)
        assert ours is not None
        assert theirs is not None
        assert (ours.read, ours.written) == (2, sent)
        assert (theirs.read, theirs.written) == (3, 6)


def test_nothing_is_known_while_it_connects() -> None:
    report = Report(proof.SYN_RECV, acked=0, received=5, unread=0, unacked=0)
    assert counts_of(report, has_connected=False) is None


def test_what_a_way_has_lost_is_neither_sent_nor_in_its_pipe() -> None:
    src = Counts(read=100, written=0, has_ended=False, was_ended=False, is_closed=False)
    dst = Counts(read=0, written=60, has_ended=False, was_ended=False, is_closed=False)
    gone = Counts(read=0, written=0, has_ended=False, was_ended=False, is_closed=True)
    assert missing(src, dst, waiting=40) == 0
    assert missing(src, dst, waiting=39) == 1
    assert missing(dst, src, waiting=0) == 0
    assert missing(src, gone, waiting=0) == 0
