"""A session of a dead worker goes on, or is reset on both sides if the kernel misses bytes."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.by_hand import Bench, accepted, pool_of, target_of
from support.ends import receive_to_end

from forwarder.ipc.deposit import KEPT
from forwarder.relay.moving.adopting import Kept
from forwarder.relay.moving.parcel import Parcel
from forwarder.stats.reasons import REASONS
from forwarder.stats.rows import ENDS, SESSIONS

if TYPE_CHECKING:
    from contextlib import ExitStack

    from support.by_hand import StubPool


class Orphan:
    """What a dead worker has left: two sockets, and the other ends of both."""

    def __init__(self, stack: ExitStack) -> None:
        self.client, self.ours, _ = accepted()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.to_upstream = socket.create_connection(listener.getsockname())
            self.upstream, _ = listener.accept()
            self.pool: StubPool = pool_of((target_of(listener),), 1.0)
        for sock in (self.client, self.upstream):
            stack.enter_context(sock)

    def be_adopted(self, bench: Bench) -> None:
        """As a worker does that gets it."""
        parcel = Parcel(kind=KEPT, id=7 << 32, terms=0, client="", state="relaying")
        fds = [self.ours.detach(), self.to_upstream.detach()]
        session = Kept().unpack(parcel, fds, self.pool, bench.relay)
        assert session.client_address == self.client.getsockname()
        self.pool.counts[SESSIONS] += 1
        for _ in range(3):
            bench.relay.poller.turn()
            bench.loop.pass_time(0)

    def lost(self) -> int:
        return self.pool.counts[ENDS + REASONS.index("us/lost")]


def test_a_session_goes_on_with_what_waits_in_its_sockets(bench: Bench, stack: ExitStack) -> None:
    it = Orphan(stack)
    it.client.sendall(b"to be read")
    it.upstream.sendall(b"answer")
    it.upstream.shutdown(socket.SHUT_WR)
    it.be_adopted(bench)
    assert it.upstream.recv(100) == b"to be read"
    assert receive_to_end(it.client) == b"answer"
    assert it.lost() == 0


def test_a_session_of_which_bytes_are_missing_is_reset_on_both_sides(
    bench: Bench, stack: ExitStack
) -> None:
    it = Orphan(stack)
    it.client.sendall(b"to be lost")
    assert it.ours.recv(5) == b"to be"  # and the worker dies
    it.be_adopted(bench)
    for sock in (it.client, it.upstream):
        with pytest.raises(ConnectionResetError):
            sock.recv(100)
    assert it.lost() == 1
    assert not bench.relay.sessions
