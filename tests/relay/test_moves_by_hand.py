"""A stream goes on in another worker in every state, and neither end sees anything of it."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.by_hand import RULE, StubPool, pool_of, target_of
from support.ends import (
    Link,
    accept,
    listen,
    receive_to_end,
    reset,
    seeded,
)
from support.moving import Pair
from support.waiting import eventually

from forwarder.config.model import Limits, RelayMode
from forwarder.relay.session import SessionState
from forwarder.stats.reasons import REASONS
from forwarder.stats.rows import ENDS, MOVED_IN, MOVED_OUT, SESSIONS, SESSIONS_TOTAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.moving import Side

    from forwarder.config.model import Rule

MODES = [
    (RelayMode.AUTO, RelayMode.AUTO),
    (RelayMode.COPY, RelayMode.COPY),
    (RelayMode.AUTO, RelayMode.COPY),
    (RelayMode.COPY, RelayMode.AUTO),
]
EVERY_MODE = pytest.mark.parametrize(
    "pair", MODES, ids=lambda modes: "-".join(mode.value for mode in modes), indirect=True
)
BOTH = pytest.mark.parametrize("first", ["client", "upstream"])


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """See :class:`Pair`."""
    with closing(Pair(*getattr(request, "param", ()))) as pair:
        yield pair


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where sessions lead."""
    with listen() as sock:
        yield sock


def link(pair: Pair, listener: socket.socket, rule: Rule = RULE) -> Link:
    """A session of the first relay, by a rule that both have."""
    for side in pair.sides:
        side.serve(StubPool(rule, (target_of(listener),)))
    client = pair.open(side_pool(pair.one))
    upstream = pair._stack.enter_context(accept(listener))
    turning(pair, lambda: pair.one.session.state is SessionState.RELAYING)
    return Link(client, upstream)


def side_pool(side: Side) -> StubPool:
    (pool,) = side.pools.in_force.values()
    assert isinstance(pool, StubPool)
    return pool


def turning(pair: Pair, condition: Callable[[], object]) -> None:
    """Turn both relays until something has come of that."""

    def is_so() -> bool:
        pair.turn()
        return bool(condition())

    eventually(is_so)


def pass_on(pair: Pair, near: socket.socket, far: socket.socket, data: bytes) -> None:
    """What one end sends arrives at the other one."""
    near.sendall(data)
    arrives(pair, far, data)


def arrives(pair: Pair, far: socket.socket, data: bytes) -> None:
    far.settimeout(0)
    received = bytearray()

    def is_there() -> bool:
        with suppress(BlockingIOError):
            received.extend(far.recv(1 << 20))
        return len(received) >= len(data)

    turning(pair, is_there)
    assert received == data
    far.settimeout(10)


def clog(pair: Pair, near: socket.socket, far_direction: Callable[[], bool]) -> int:
    """Send until what was read cannot be sent on; returns how much was sent."""
    near.settimeout(0)
    data = seeded(1 << 20, 7)
    sent = 0
    for _ in range(100_000):
        try:
            sent += near.send(data[sent % len(data) :])
        except BlockingIOError:
            if far_direction():
                break
        pair.turn()
    near.settimeout(10)
    assert far_direction()
    return sent


def clogged(count: int) -> bytes:
    """What :func:`clog` has sent."""
    data = seeded(1 << 20, 7)
    return (data * (count // len(data) + 1))[:count]


def ends(side: Side) -> dict[str, int]:
    """Why sessions have ended in a worker."""
    return {code: side.row(1)[ENDS + i] for i, code in enumerate(REASONS) if side.row(1)[ENDS + i]}


@EVERY_MODE
def test_bytes_go_both_ways_before_meanwhile_and_after(pair: Pair, listener: socket.socket) -> None:
    near, far = link(pair, listener)
    pass_on(pair, near, far, b"one")
    pass_on(pair, far, near, b"two")

    def meanwhile() -> None:
        near.sendall(b"three")
        far.sendall(b"four")

    assert pair.move(pair.one, pair.other, meanwhile) == 1
    arrives(pair, far, b"three")
    arrives(pair, near, b"four")
    pass_on(pair, near, far, seeded(300_000, 1)[:60_000])
    assert pair.move(pair.other, pair.one) == 1
    pass_on(pair, far, near, b"five")
    near.shutdown(socket.SHUT_WR)
    turning(pair, lambda: pair.one.session.state is SessionState.HALF_CLOSED)
    assert receive_to_end(far) == b""


def test_one_session_is_counted_once_and_ends_once(pair: Pair, listener: socket.socket) -> None:
    near, far = link(pair, listener)
    born = pair.one.session.id
    pair.loop.pass_time(5)
    pass_on(pair, near, far, b"12345")
    pair.one.relay.count(pair.one.row(0))
    before = pair.one.session
    pair.loop.pass_time(7)
    pair.move(pair.one, pair.other)
    session = pair.other.session
    assert session.id == born
    assert (session.started_at, session.connected_at) == (before.started_at, before.connected_at)
    assert pair.loop.now - session.active_at == pytest.approx(7)
    assert session.target == before.target
    assert before.state is SessionState.CLOSED
    one, other = pair.one.row(1), pair.other.row(1)
    assert (one[SESSIONS], one[SESSIONS_TOTAL], one[MOVED_OUT], one[MOVED_IN]) == (0, 1, 1, 0)
    assert (other[SESSIONS], other[SESSIONS_TOTAL], other[MOVED_OUT], other[MOVED_IN]) == (
        1,
        0,
        0,
        1,
    )
    pass_on(pair, near, far, b"678")
    near.close()
    far.close()
    turning(pair, lambda: not pair.other.relay.sessions)
    assert (ends(pair.one), ends(pair.other)) == ({}, {"upstream/data": 1}) or ends(pair.other) == {
        "client/data": 1
    }
    assert [side.relay.books.bytes_c2u for side in pair.sides] == [5, 3]


@BOTH
@EVERY_MODE
def test_what_was_read_and_not_sent_goes_along(
    pair: Pair, listener: socket.socket, first: str
) -> None:
    """Full both ways, and moved twice."""
    found = link(pair, listener)
    near, far = found.end(first)
    session = pair.one.session
    way, back = (session.c2u, session.u2c) if first == "client" else (session.u2c, session.c2u)
    count = clog(pair, near, lambda: way.holds_data)
    other_count = clog(pair, far, lambda: back.holds_data)
    pair.move(pair.one, pair.other)
    assert pair.other.session.c2u.holds_data
    assert pair.other.session.u2c.holds_data
    pair.move(pair.other, pair.one)
    assert not pair.other.relay.bench.pipes.statistics().made
    arrives(pair, far, clogged(count))
    arrives(pair, near, clogged(other_count))
    pass_on(pair, near, far, b"and on")
    near.close()
    turning(pair, lambda: pair.one.session.state is SessionState.HALF_CLOSED)
    assert receive_to_end(far) == b""


@BOTH
@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_an_end_is_passed_on_whenever_it_comes(
    pair: Pair, listener: socket.socket, first: str, when: str
) -> None:
    near, far = link(pair, listener).end(first)

    def end() -> None:
        near.sendall(b"last words")
        near.shutdown(socket.SHUT_WR)
        pair.turn()

    if when == "before":
        end()
        turning(pair, lambda: pair.one.session.state is SessionState.HALF_CLOSED)
    pair.move(pair.one, pair.other, end if when == "meanwhile" else None)
    if when == "after":
        end()
    turning(pair, lambda: pair.other.session.state is SessionState.HALF_CLOSED)
    assert receive_to_end(far) == b"last words"
    pass_on(pair, far, near, b"answer")
    pair.move(pair.other, pair.one)
    pass_on(pair, far, near, b"another one")
    far.shutdown(socket.SHUT_WR)
    turning(pair, lambda: not pair.one.relay.sessions)
    assert receive_to_end(near) == b""
    assert sum(ends(pair.one).values()) == 1


@BOTH
@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
@EVERY_MODE
def test_a_reset_cuts_whenever_it_comes(
    pair: Pair, listener: socket.socket, first: str, when: str
) -> None:
    """What had been sent before that arrives first: ABORTING, and moved in that state as well."""
    near, far = link(pair, listener).end(first)
    session = pair.one.session
    way = session.c2u if first == "client" else session.u2c
    count = clog(pair, near, lambda: way.holds_data)
    if when == "before":
        reset(near)
        turning(pair, lambda: pair.one.session.ending is not None)
    pair.move(pair.one, pair.other, (lambda: reset(near)) if when == "meanwhile" else None)
    if when == "after":
        reset(near)
    turning(pair, lambda: pair.other.session.ending is not None)
    pair.move(pair.other, pair.one)
    received = bytearray()
    far.settimeout(0)

    def is_cut() -> bool:
        try:
            received.extend(far.recv(1 << 16))
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return True
        if pair.one.relay.sessions:
            pair.move(pair.one, pair.other)
            pair.move(pair.other, pair.one)
            pair.loop.pass_time(0.1)
        return False

    turning(pair, is_cut)
    assert clogged(count).startswith(received)
    turning(pair, lambda: not pair.one.relay.sessions)
    assert ends(pair.one) == {f"{first}/data/reset": 1}


@BOTH
def test_a_reset_behind_an_end_lets_the_rest_arrive(
    pair: Pair, listener: socket.socket, first: str
) -> None:
    """LINGERING: the survivor gets everything and the end, in whichever worker."""
    near, far = link(pair, listener).end(first)
    session = pair.one.session
    way = session.c2u if first == "client" else session.u2c
    far.sendall(b"never read")
    count = clog(pair, near, lambda: way.holds_data)
    near.close()
    del count
    turning(pair, lambda: way.holds_data)
    pair.move(pair.one, pair.other)
    pair.loop.pass_time(0.3)
    received = bytearray()
    far.settimeout(0)

    def is_over() -> bool:
        try:
            part = far.recv(1 << 16)
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return True
        else:
            received.extend(part)
            if not part:
                return True
        for giver, taker in (pair.sides, pair.sides[::-1]):
            pair.move(giver, taker)
        pair.loop.pass_time(0.1)
        return False

    turning(pair, is_over)
    far.close()
    turning(pair, lambda: not any(side.relay.sessions for side in pair.sides))


def test_what_is_not_connected_is_busy(pair: Pair) -> None:
    for side in pair.sides:
        side.serve(pool_of(None, 10.0))
    client = pair.open(side_pool(pair.one))
    given = pair.pack(pair.one)
    assert (len(given), given.left, given.busy) == (0, 0, 1)
    assert not pair.one.mover.is_out
    given.close()
    client.close()


def test_so_many_as_are_wanted_go_and_the_others_are_left(
    pair: Pair, listener: socket.socket
) -> None:
    link(pair, listener)
    for _ in range(2):
        pair.open(side_pool(pair.one))
        pair._stack.enter_context(accept(listener))
    turning(
        pair,
        lambda: all(one.state is SessionState.RELAYING for one in pair.one.relay.sessions),
    )
    given = pair.pack(pair.one, 2)
    assert (len(given), given.left, given.busy) == (2, 1, 0)
    pair.deliver(given, pair.other)
    pair.settle(pair.one, given)
    given.close()
    assert [len(side.relay.sessions) for side in pair.sides] == [1, 2]


def test_the_chosen_ones_go(pair: Pair, listener: socket.socket) -> None:
    link(pair, listener)
    assert pair.move(pair.one, pair.other, rule="another") == 0
    assert pair.move(pair.one, pair.other, rule=RULE.name) == 1


def test_a_session_under_a_meter_waits_on_in_the_other_worker(
    pair: Pair, listener: socket.socket
) -> None:
    rule = replace(RULE, limits=Limits(bandwidth=1000.0))
    near, far = link(pair, listener, rule)
    near.sendall(bytes(50_000))
    turning(pair, lambda: pair.one.session.c2u.is_held_up)
    former = pair.one.session.c2u
    pair.move(pair.one, pair.other)
    assert not former.is_held_up
    turning(pair, lambda: pair.other.session.c2u.is_held_up)
    moved = pair.other.session.c2u.moved

    def has_gone_on() -> bool:
        pair.loop.pass_time(0.01)
        return moved < pair.other.session.c2u.moved

    turning(pair, has_gone_on)
    near.close()
    far.close()


@pytest.mark.parametrize("per_client", [0, 5])
def test_a_place_within_limits_is_passed_on(
    pair: Pair, listener: socket.socket, per_client: int
) -> None:
    rule = replace(RULE, limits=Limits(max_sessions=3, max_sessions_per_client=per_client))
    near, far = link(pair, listener, rule)
    gate = pair.shared.gate
    held_as = pair.one.session.held_as
    assert held_as is not None
    shared: list[int] = []

    def look() -> None:
        pair.turn()
        shared.append(gate.sessions(1))
        assert [side.holdings.rows[1] for side in pair.sides] == [0, 0]

    pair.move(pair.one, pair.other, look)
    assert shared == [1] == [gate.sessions(1)] == [gate.sessions(0)]
    assert pair.other.session.held_as == held_as
    assert [side.holdings.rows[1] for side in pair.sides] == [0, 1]
    assert [side.holdings.rows[0] for side in pair.sides] == [0, 1]
    if per_client:
        assert gate.sessions_of(held_as) == 1
        assert [side.holdings.clients.get(held_as) for side in pair.sides] == [0, 1]
    near.close()
    far.close()
    turning(pair, lambda: not gate.sessions(1))
    assert gate.sessions(0) == 0
    assert not (per_client and gate.sessions_of(held_as))
