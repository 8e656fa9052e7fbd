"""Reasons that need a failure which no outside can cause, on a clock that the test turns."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from support.by_hand import RULE, Bench, StubPool, accepted, pool_of, target_of
from support.ends import accept, listen, receive_to_reset
from support.groups import turning
from support.logged import read_json

from forwarder.config.model import Balance, LogFormat
from forwarder.net.sockets import ACCEPT_IGNORE, Target
from forwarder.relay.access import AccessList, Decision
from forwarder.relay.tcp.stream import Stream
from forwarder.relay.tcp_listener import Listener
from forwarder.stats.reasons import REASONS, CloseReason, Phase, Who
from forwarder.stats.rows import ENDS, REFUSED, SESSIONS, SESSIONS_TOTAL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Its log goes to ``json`` and ``rinetd``."""
    bench = Bench()
    bench.relay.books.connlog.set_places(
        [
            (how, how.value, os.open(tmp_path / how.value, os.O_RDWR | os.O_APPEND | os.O_CREAT))
            for how in (LogFormat.JSON, LogFormat.RINETD)
        ]
    )
    yield bench
    bench.close()


def written(bench: Bench, pool: StubPool, path: Path) -> tuple[Counter[str], list[str]]:
    """Reasons in the JSON log, which must be those that were counted; and rinetd's results."""
    bench.relay.books.connlog.close()
    counts = pool.counts
    reasons = Counter(str(entry["end"]) for entry in read_json(path / "json"))
    assert reasons == Counter(
        {code: counts[ENDS + i] for i, code in enumerate(REASONS) if counts[ENDS + i]}
    )
    assert reasons.total() + counts[SESSIONS] == counts[SESSIONS_TOTAL] + counts[REFUSED]
    lines = (path / "rinetd").read_text().splitlines()
    return reasons, [line.split("\t")[-1] for line in lines]


def test_a_name_server_that_does_not_answer_is_our_reason(bench: Bench, tmp_path: Path) -> None:
    pool = pool_of(None, 1.0)
    with bench.open(pool) as client:
        bench.loop.pass_time(2)
        assert receive_to_reset(client) == b""
    assert written(bench, pool, tmp_path) == (
        Counter(["us/connect"]),
        ["local-connect-failed -"],
    )


def test_a_server_that_was_not_used_is_not_in_rinetds_log(bench: Bench, tmp_path: Path) -> None:
    """Its fields are there all the same; those of who was served say where."""
    with listen() as one, listen() as other:
        found = [(target_of(sock),) for sock in (one, other)]
        changes = {index: {"max_sessions": 1} for index in range(2)}
        pool = bench.group(*found, changes=changes, balance=Balance.FIRST)
        with bench.open(pool), bench.open(pool), bench.open(pool) as client:
            turning(bench, lambda: len(bench.relay.sessions) == 2)
            assert receive_to_reset(client) == b""
            bench.relay.abort_sessions(Phase.KILL, "the test")
        books, decision = bench.relay.books, Decision.DENIED
        books.on_refused(pool, ("192.0.2.1", 9), lambda: target_of(one), decision)
        reached = [[host, str(port)] for host, port in (one.getsockname(), other.getsockname())]
    written(bench, pool, tmp_path)
    lines = (tmp_path / "rinetd").read_text().splitlines()
    upstreams = [line.split("\t")[4:6] for line in lines]
    assert sorted(upstreams) == sorted([["-", "0"], ["-", "0"], *reached, *reached])


def test_a_bug_ends_the_session_and_is_counted(bench: Bench, tmp_path: Path) -> None:
    class Broken(StubPool):
        def targets(self) -> tuple[Target, ...] | None:
            raise ZeroDivisionError

    pool = Broken(RULE, ())
    with bench.open(pool) as client:
        bench.loop.pass_time(0)
        assert receive_to_reset(client) == b""
    assert written(bench, pool, tmp_path)[0] == Counter(["us/error"])


def test_no_address_to_connect_from_is_said_at_the_descriptor_limit_too(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is an address or a port that lacks cannot be tried out then."""
    pool = pool_of((Target(socket.AF_INET6, ("::1", 1, 0, 0)),), 10.0)

    def no_address(_session: Stream, _upstream: socket.SocketType, _target: Target) -> int:
        return errno.EADDRNOTAVAIL

    def no_descriptor(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "connect", no_address)
        client, sock, address = accepted()
        patched.setattr(socket, "socket", no_descriptor)
        bench.relay.open_session(pool, sock, address)
        bench.loop.pass_time(0)
    with client:
        assert receive_to_reset(client) == b""
    assert written(bench, pool, tmp_path)[0] == Counter(["upstream/connect"])


def test_a_stop_ends_what_is_open_whatever_it_was_doing(bench: Bench, tmp_path: Path) -> None:
    with listen() as upstream:
        pool = pool_of((Target(socket.AF_INET, upstream.getsockname()),), 10.0)
        resolving = pool_of(None, 10.0)
        resolving.counts = pool.counts
        with bench.open(pool), bench.open(resolving), accept(upstream):
            bench.relay.poller.turn()
            bench.relay.abort_sessions(Phase.SHUTDOWN, "worker stopped")
            bench.loop.pass_time(0)
            assert not bench.relay.sessions
    reasons, results = written(bench, pool, tmp_path)
    assert reasons == Counter({"us/shutdown": 2})
    assert sorted(results) == ["done-local-closed", "done-local-closed", "opened"]


class FailingSocket(socket.socket):
    """A listening socket whose queue is full of what cannot be accepted."""

    def __init__(self, errors: list[int]) -> None:
        super().__init__()
        self._errors = errors
        self.bind(("127.0.0.1", 0))

    def _accept(self) -> tuple[int, object]:
        if self._errors:
            number = self._errors.pop()
            raise OSError(number, os.strerror(number))
        raise BlockingIOError


def test_every_client_that_was_gone_before_it_was_accepted_is_counted(
    bench: Bench, tmp_path: Path
) -> None:
    pool = pool_of((), 1.0)
    errors = sorted(ACCEPT_IGNORE - {errno.EINTR})
    with FailingSocket([*errors]) as sock:
        listener = Listener(bench.loop, bench.relay, sock, pool, AccessList(()))
        for _ in range(3):
            listener.on_events(1)
        port = sock.getsockname()[1]
    reasons, results = written(bench, pool, tmp_path)
    assert reasons == Counter({"us/accept": len(errors)})
    assert results == ["accept-failed -"] * len(errors)
    (first, *_) = read_json(tmp_path / "json")
    assert (first["client"], first["event"], first["id"]) == ("?", "refused", "")
    assert first["local"] == f"127.0.0.1:{port}"
    assert os.strerror(errors[-1]) == first["detail"]
    line = (tmp_path / "rinetd").read_text().splitlines()[0].split("\t")
    assert line[1:4] == ["?", "127.0.0.1", str(port)]


def test_a_session_that_is_being_aborted_is_counted_once(bench: Bench, tmp_path: Path) -> None:
    """The upstream resets while the client has still to take what it sent; then we stop."""
    with listen() as upstream:
        pool = pool_of((Target(socket.AF_INET, upstream.getsockname()),), 10.0)
        with bench.open(pool), accept(upstream):
            bench.relay.poller.turn()
            (session,) = bench.relay.sessions
            session.abort(CloseReason(Who.UPSTREAM, Phase.DATA, is_reset=True))
            session.abort(CloseReason(Who.US, Phase.KILL))
            bench.relay.abort_sessions(Phase.SHUTDOWN, "again", [session])
    assert written(bench, pool, tmp_path)[0] == Counter(["upstream/data/reset"])
    assert pool.counts[SESSIONS] == 0
