"""Sessions of a relay in this process, whose clock and loop the test turns by hand."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.by_hand import RULE, Bench, pool_of, target_of
from support.clogged import CloggedUpstream
from support.ends import accept, connect, listen, listen_unix, receive_exactly, receive_to_reset

from forwarder.config.model import AccessRule, Limits, Verdict
from forwarder.errors import Place
from forwarder.limits.admission import Admission
from forwarder.limits.gate import Gate, Holder, Holdings
from forwarder.net.sockets import Target
from forwarder.relay.access import AccessList
from forwarder.relay.pauses import PAUSE_S
from forwarder.relay.poller import Poller
from forwarder.relay.tcp import fast_open
from forwarder.relay.tcp_listener import ACCEPT_BATCH, Listener
from forwarder.relay.wheel import BUCKETS, TICK_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forwarder.net.sockets import SockAddr


TURN_S = BUCKETS * TICK_S


@pytest.mark.parametrize("idle_s", [0.0, TURN_S - 3, TURN_S + 20, 1e6])
@pytest.mark.parametrize("timeout_s", [1.0, 10.0, TURN_S, 3 * TURN_S])
def test_a_connect_gets_all_its_time_and_no_more(
    bench: Bench, idle_s: float, timeout_s: float
) -> None:
    """However long the relay was idle before, and however many turns of the wheel it takes."""
    with CloggedUpstream() as clogged:
        target = Target(socket.AF_INET, clogged.listener.getsockname())
        bench.loop.pass_time(idle_s)
        with bench.open(pool_of((target,), timeout_s)) as client:
            bench.loop.pass_time(timeout_s - 2 * TICK_S)
            assert len(bench.relay.sessions) == 1, "given up early"
            bench.loop.pass_time(4 * TICK_S)
            assert not bench.relay.sessions
            assert receive_to_reset(client) == b""


@pytest.mark.parametrize("idle_s", [0.0, TURN_S + 20])
def test_resolving_gets_all_its_time_and_no_more(bench: Bench, idle_s: float) -> None:
    bench.loop.pass_time(idle_s)
    with bench.open(pool_of(None, 10.0)) as client:
        bench.loop.pass_time(9.8)
        assert len(bench.relay.sessions) == 1
        bench.loop.pass_time(0.4)
        assert not bench.relay.sessions
        assert receive_to_reset(client) == b""


@pytest.mark.parametrize("how", ["no address", "too late"])
def test_many_clients_whose_name_is_not_resolved_are_all_reset(bench: Bench, how: str) -> None:
    """None of their descriptors has ever been watched.

    *Result*: no error on the way (it would keep the others from hearing), no session left.
    """
    pool = pool_of(None, 1.0)
    clients = [bench.open(pool) for _ in range(300)]
    try:
        if how == "no address":
            for callback in pool.waiting:
                callback(())
        bench.loop.pass_time(2)
        assert not bench.relay.sessions
        for client in clients:
            assert receive_to_reset(client) == b""
    finally:
        for client in clients:
            client.close()


def test_an_answer_after_the_deadline_opens_nothing(bench: Bench) -> None:
    pool = pool_of(None, 1.0)
    with bench.open(pool) as client:
        bench.loop.pass_time(2)
        assert receive_to_reset(client) == b""
        (late,) = pool.waiting
        late((Target(socket.AF_INET, ("127.0.0.1", 1)),))
        assert not bench.relay.sessions


def test_what_went_with_the_syn_to_one_upstream_is_not_missing_at_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first is given four bytes with its SYN and does not answer; the next is a unix socket.

    *Result*: that one gets all that the client has sent.
    """

    def connect_fast(
        _client: socket.SocketType, upstream: socket.SocketType, to: SockAddr, _view: memoryview
    ) -> tuple[int, int]:
        upstream.connect_ex(to)
        return 0, 4  # as where the upstream has given a cookie before

    monkeypatch.setattr(fast_open, "connect", connect_fast)
    with CloggedUpstream() as clogged, listen_unix(str(tmp_path / "there")) as there:
        pool = pool_of((target_of(clogged.listener), target_of(there)), 1.0)
        pool.opens_fast = pool.has_unix = True
        with bench.open(pool) as client:
            client.sendall(b"request")
            bench.relay.poller.turn()
            bench.loop.pass_time(1.5)
            with accept(there) as far:
                bench.relay.poller.turn()
                assert receive_exactly(far, 7) == b"request"


def listening(bench: Bench, stack: ExitStack, *access: AccessRule) -> Listener:
    """A listener that accepts, with an upstream behind it; ``stack`` closes the sockets."""
    sock, upstream = (stack.enter_context(listen()) for _ in range(2))
    sock.setblocking(False)
    listener = Listener(
        bench.loop,
        bench.relay,
        sock,
        pool_of((target_of(upstream),), 10.0),
        AccessList.compile((), access),
    )
    listener.start()
    return listener


def test_a_listener_that_stops_takes_those_that_are_queued_behind_who_may_not_in(
    bench: Bench,
) -> None:
    """More clients than are accepted at once come from a host that is denied, and then one more.

    *Result*: the last one has a session.
    """
    deny = AccessRule(verdict=Verdict.DENY, pattern="127.0.0.2", place=Place("test"))
    with ExitStack() as stack:
        listener = listening(bench, stack, deny)
        sock = listener.sock
        for _ in range(ACCEPT_BATCH):
            denied = stack.enter_context(socket.socket())
            denied.bind(("127.0.0.2", 0))
            denied.connect(sock.getsockname())
        stack.enter_context(connect(sock.getsockname()))
        listener.stop()
        assert bench.relay.books.refused == ACCEPT_BATCH
        assert len(bench.relay.sessions) == 1


def test_a_listener_that_stops_takes_those_that_are_queued_behind_who_is_decided_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More clients than are accepted at once come while others hold the lock of the limits.

    *Result*: none stays in the queue; all are decided about when the lock is free.
    """

    def is_held(*_: object) -> None:
        raise BlockingIOError

    waiting: list[Callable[[], None]] = []
    monkeypatch.setattr(bench.relay.restrictions, "decide_later", waiting.append)
    rule = replace(RULE, limits=Limits(max_sessions=1))
    with closing(Gate()) as gate, ExitStack() as stack:
        assert gate.hold(Holdings(), 1, 0)  # the one session that may be
        bench.relay.admissions[1] = Admission(Holder(gate, Holdings()), rule, 1, 0, lambda: None)
        listener = listening(bench, stack)
        for _ in range(ACCEPT_BATCH + 1):
            stack.enter_context(connect(listener.sock.getsockname()))
        with monkeypatch.context() as patched:
            patched.setattr("forwarder.limits.gate._lockf", is_held)
            listener.stop()
        assert len(waiting) == ACCEPT_BATCH + 1
        for decide in waiting:
            decide()
        assert bench.relay.books.refused == ACCEPT_BATCH + 1


def test_a_listener_that_cannot_be_watched_again_tries_until_it_can(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the watches of a user are used up, fs.epoll.max_user_watches, after a pause."""

    def register(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ExitStack() as stack:
        listener = listening(bench, stack)
        listener.on_bug()  # it rests
        stack.enter_context(connect(listener.sock.getsockname()))
        with monkeypatch.context() as patched:
            patched.setattr(Poller, "register", register)
            bench.loop.pass_time(3 * PAUSE_S)
        bench.relay.poller.turn()
        assert not bench.relay.sessions
        bench.loop.pass_time(2 * PAUSE_S)
        bench.relay.poller.turn()
        assert len(bench.relay.sessions) == 1
        listener.stop()
