"""How long a session waits for a survivor that is slow, on a clock that the test turns."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from support.by_hand import RULE, Bench, StubPool, target_of
from support.ends import accept, fill, listen, receive_to_end, receive_to_reset, reset, seeded

from forwarder.net.sockets import unsent_bytes
from forwarder.relay.tcp.stream import ABORT_GRACE_S
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import ENDS

HALF_CLOSE_S = 60.0
# More than the client's receive queue takes while it is not read, less than our send queue.
ANSWER = seeded(600_000, 21)


class Lost:
    """A session whose upstream is reset while most of its answer is still to be read.

    ``has_ended``: whether the upstream had sent its FIN before.
    """

    def __init__(self, bench: Bench, *, has_ended: bool) -> None:
        self.bench = bench
        self.received = bytearray()
        with listen() as listener:
            rule = replace(RULE, half_close_timeout_s=HALF_CLOSE_S)
            self.pool = StubPool(rule, (target_of(listener),))
            self.client = bench.open(self.pool)
            upstream = accept(listener)
        sent = 0
        while sent < len(ANSWER) or unsent_bytes(upstream):
            sent += fill(upstream, ANSWER[sent:], quiet_s=0)
            self.turn()
        if has_ended:
            upstream.shutdown(socket.SHUT_WR)
            self.turn()
        reset(upstream)
        self.turn()

    def turn(self) -> None:
        """Let the relay handle what has happened, and what follows from that."""
        for _ in range(5):
            self.bench.relay.poller.turn()
            self.bench.loop.pass_time(0)

    def read(self, count: int = 1 << 20) -> None:
        """Have the client read a little."""
        self.received += self.client.recv(count)
        self.turn()

    @property
    def ends(self) -> list[str]:
        """How it has ended, if it has."""
        return [code for index, code in enumerate(REASONS) if self.pool.counts[ENDS + index]]


BOTH = pytest.mark.parametrize("has_ended", [True, False])


@BOTH
def test_a_survivor_that_reads_on_gets_all_however_long_it_takes(
    bench: Bench, *, has_ended: bool
) -> None:
    """A little every now and then, for minutes; what it says meanwhile is no reason to hurry."""
    it = Lost(bench, has_ended=has_ended)
    with it.client as client:
        while len(it.received) < len(ANSWER):
            it.read(20_000)
            if bench.relay.sessions:
                client.sendall(b"and more")
            bench.loop.pass_time(ABORT_GRACE_S / 5)
        bench.loop.pass_time(ABORT_GRACE_S)
        assert it.received == ANSWER
        assert (receive_to_end if has_ended else receive_to_reset)(client) == b""
    assert it.ends == [f"upstream/{'half-close' if has_ended else 'data'}/reset"]


@BOTH
def test_a_survivor_that_takes_nothing_more_is_reset_in_the_end(
    bench: Bench, *, has_ended: bool
) -> None:
    limit_s = HALF_CLOSE_S if has_ended else ABORT_GRACE_S
    it = Lost(bench, has_ended=has_ended)
    with it.client as client:
        it.read(4096)
        bench.loop.pass_time(limit_s - 2)
        assert bench.relay.sessions, "given up early"
        bench.loop.pass_time(4)
        assert not bench.relay.sessions
        assert ANSWER.startswith(it.received + receive_to_reset(client))
    assert it.ends == ["us/half-close" if has_ended else "upstream/data/reset"]


@BOTH
def test_a_survivor_that_speaks_and_reads_nothing_has_no_more_time_than_a_silent_one(
    bench: Bench, *, has_ended: bool
) -> None:
    it = Lost(bench, has_ended=has_ended)
    with it.client as client:
        for _ in range(int(HALF_CLOSE_S) + 4):
            if bench.relay.sessions:
                client.sendall(b"and more")
            it.turn()
            bench.loop.pass_time(1)
        assert not bench.relay.sessions


@BOTH
def test_a_session_that_waits_for_its_survivor_can_be_ended(
    bench: Bench, *, has_ended: bool
) -> None:
    it = Lost(bench, has_ended=has_ended)
    with it.client as client:
        bench.relay.abort_sessions(Phase.KILL, "killed")
        bench.loop.pass_time(0)
        assert not bench.relay.sessions
        receive_to_reset(client)
    assert it.ends == ["us/kill"]


@BOTH
def test_a_survivor_that_goes_too_ends_it(bench: Bench, *, has_ended: bool) -> None:
    """*Result*: at once; the reason is its own where nothing else was cut."""
    it = Lost(bench, has_ended=has_ended)
    reset(it.client)
    it.turn()
    assert not bench.relay.sessions
    assert it.ends == ["client/half-close/reset" if has_ended else "upstream/data/reset"]
