"""A worker that was stopped for long: what has happened meanwhile counts before what is overdue."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.by_hand import RULE, Bench, StubPool, target_of
from support.ends import accept, listen

from forwarder.relay.wheel import TICK_S

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

LIMIT_S = 10.0
FROZEN_S = 60.0


@pytest.fixture
def upstream() -> Iterator[socket.socket]:
    with listen() as it:
        yield it


def pool_to(upstream: socket.socket) -> StubPool:
    rule = replace(RULE, connect_timeout_s=LIMIT_S, idle_timeout_s=LIMIT_S)
    return StubPool(rule, (target_of(upstream),))


def freeze(bench: Bench) -> None:
    """Stop the worker for a while, and let it run again: its timers are what comes first."""
    bench.loop.now += FROZEN_S
    bench.loop.pass_time(0)
    bench.relay.poller.turn()
    bench.loop.pass_time(5 * TICK_S)


def test_a_connect_that_worked_meanwhile_did_not_take_too_long(
    bench: Bench, upstream: socket.socket
) -> None:
    with bench.open(pool_to(upstream)) as client, accept(upstream) as peer:
        freeze(bench)
        client.sendall(b"hello")
        bench.relay.poller.turn()
        assert peer.recv(5) == b"hello"


def test_data_that_came_meanwhile_is_a_sign_of_life(bench: Bench, upstream: socket.socket) -> None:
    with bench.open(pool_to(upstream)) as client, accept(upstream) as peer:
        bench.relay.poller.turn()
        client.sendall(b"hello")
        freeze(bench)
        assert peer.recv(5) == b"hello"
        peer.sendall(b"world")
        bench.relay.poller.turn()
        assert client.recv(5) == b"world"


def test_a_session_without_a_sign_of_life_ends_all_the_same(
    bench: Bench, upstream: socket.socket
) -> None:
    with bench.open(pool_to(upstream)) as client, accept(upstream) as peer:
        bench.relay.poller.turn()
        freeze(bench)
        assert peer.recv(1) == b""
        assert client.recv(1) == b""
