"""A stream goes on in another worker in every state, and neither end sees anything of it."""

from __future__ import annotations

import os
import socket
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from support import procfs
from support.by_hand import RULE, StubPool, group_of, pool_of, target_of
from support.ends import (
    Link,
    accept,
    listen,
    listen_unix,
    receive_to_end,
    receive_to_reset,
    reset,
    seeded,
)
from support.moving import Pair
from support.waiting import eventually

from forwarder.config.address import UnixAddress
from forwarder.config.model import (
    AccessRule,
    Balance,
    Config,
    Limits,
    RelayMode,
    Settings,
    Upstream,
    Verdict,
)
from forwarder.errors import Place
from forwarder.ipc.channel import Channel
from forwarder.ipc.consignment import Consignment
from forwarder.ipc.deposit import Word
from forwarder.ipc.messages import Op
from forwarder.limits.gate import Holdings
from forwarder.relay.access import access_of
from forwarder.relay.denials import Denials
from forwarder.relay.listing import group_of as group_name
from forwarder.relay.moving import packing
from forwarder.relay.moving.terms import terms_of
from forwarder.relay.poller import ALWAYS
from forwarder.relay.servers import Servers
from forwarder.relay.session import SessionState
from forwarder.relay.tcp.direction import SPLICES, Direction
from forwarder.stats.board import SHARED_ROW
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import ENDS, MOVED_IN, MOVED_OUT, SESSIONS, SESSIONS_TOTAL
from forwarder.supervision.keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from support.moving import Side

    from forwarder.balancing.server import Server
    from forwarder.config.model import Rule
    from forwarder.ipc.channel import Message
    from forwarder.supervision.keeper import Deposit

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


# -- servers of groups


def grouped(pair: Pair, *listeners: socket.socket, **group: object) -> None:
    """Both have a rule with a group of these servers."""
    targets = [(target_of(sock),) for sock in listeners]
    for side in pair.sides:
        pool = group_of(
            side.relay,
            pair.shared,
            pair.loop.time,
            targets,
            RULE,
            changes={0: {"max_sessions": 1}},
            group=group,
        )
        side.serve(pool)


def test_the_place_at_a_server_goes_along(pair: Pair, listener: socket.socket) -> None:
    grouped(pair, listener, balance=Balance.LEAST)
    client = pair.open(side_pool(pair.one))
    with accept(listener):
        turning(pair, lambda: pair.one.session.state is SessionState.RELAYING)
        (server,) = servers_of(pair.one)
        row, gate = server.row, pair.shared.gate
        seen: list[tuple[int, list[int]]] = []

        def look() -> None:
            pair.turn()
            seen.append((gate.sessions(row), [side.holdings.rows[row] for side in pair.sides]))

        pair.move(pair.one, pair.other, look)
        look()
        assert seen == [(1, [0, 0]), (1, [0, 1])]
        assert pair.other.session.server is servers_of(pair.other)[0]
        counts = pair.shared.row(row)
        assert (counts[SESSIONS], counts[MOVED_OUT], counts[MOVED_IN]) == (1, 1, 1)
        assert group_name(pair.other.session) == "some group"
        refused = pair.open(side_pool(pair.one))
        turning(pair, lambda: not pair.one.relay.sessions)
        assert receive_to_reset(refused) == b""
        client.close()
    turning(pair, lambda: not pair.other.relay.sessions)
    turning(pair, lambda: gate.sessions(row) == 0)
    assert pair.shared.row(row)[SESSIONS] == 0


@pytest.mark.parametrize("balance", [Balance.LEAST, Balance.TURN])
def test_a_server_that_the_taker_does_not_know_is_counted_where_it_was(
    pair: Pair, listener: socket.socket, balance: Balance
) -> None:
    """The rule is another one in the other worker, or gone; and the session moves on from there."""
    grouped(pair, listener, balance=balance)
    client = pair.open(side_pool(pair.one))
    with accept(listener):
        turning(pair, lambda: pair.one.session.state is SessionState.RELAYING)
        row = servers_of(pair.one)[0].row
        pair.other.serve(StubPool(replace(RULE, name="another"), (target_of(listener),)))
        pair.other.rows[row] = pair.shared.row(row)
        pair.move(pair.one, pair.other)
        server = pair.other.session.server
        assert server is not None
        assert (server.row, server.name) == (row, servers_of(pair.one)[0].name)
        assert pair.shared.row(row)[SESSIONS] == 1
        assert pair.other.row(1)[SESSIONS] == 1  # in the row of its rule
        pair.move(pair.other, pair.one)
        assert pair.one.session.server is servers_of(pair.one)[0]
        pair.move(pair.one, pair.other)
        client.close()
    turning(pair, lambda: not pair.other.relay.sessions)
    assert pair.shared.row(row)[SESSIONS] == 0


def servers_of(side: Side) -> tuple[Server, ...]:
    balancer = side_pool(side).balancer
    assert balancer is not None
    return balancer.servers


# -- rules that are gone, other instances


def test_a_session_of_a_rule_that_is_gone_ends_when_it_would_have(
    pair: Pair, listener: socket.socket
) -> None:
    near, far = link(pair, listener)
    pair.one.cuts.limit_s = 10.0
    pair.one.cuts.begin([pair.one.session])
    for side in pair.sides:
        side.pools.in_force = {}
    pair.loop.pass_time(4)
    pair.move(pair.one, pair.other)
    assert pair.other.session.pool.rule.name == RULE.name
    assert pair.other.session.pool.rule.idle_timeout_s == RULE.idle_timeout_s
    pair.loop.pass_time(5.9)
    pass_on(pair, near, far, b"still there")
    pair.loop.pass_time(0.2)
    pair.turn()
    assert receive_to_reset(far) == b""
    assert ends(pair.other) == {"us/drain": 1}
    assert ends(pair.one) == {}


def test_a_session_whose_rule_the_taker_does_not_have_may_go_on_for_as_long_as_there(
    pair: Pair, listener: socket.socket
) -> None:
    link(pair, listener)
    pair.other.cuts.limit_s = 3.0
    pair.other.pools.in_force = {}
    pair.move(pair.one, pair.other)
    pair.loop.pass_time(2.9)
    assert pair.other.relay.sessions
    pair.loop.pass_time(0.2)
    assert not pair.other.relay.sessions


def test_pools_of_former_rules_are_shared_and_go_with_their_sessions(
    pair: Pair, listener: socket.socket
) -> None:
    link(pair, listener)
    pair.open(side_pool(pair.one))
    pair._stack.enter_context(accept(listener))
    turning(
        pair,
        lambda: all(one.state is SessionState.RELAYING for one in pair.one.relay.sessions),
    )
    pair.other.pools.in_force = {}
    pair.move(pair.one, pair.other)
    first, second = pair.other.relay.sessions
    assert first.pool is second.pool
    assert len(pair.other.pools._brought) == 1
    del first, second
    pair.other.relay.abort_sessions(Phase.KILL, "the test")
    pair.turn()
    assert not pair.other.pools._brought


def test_a_session_of_another_instance_is_counted_and_held_anew(
    pair: Pair, listener: socket.socket
) -> None:
    rule = replace(RULE, limits=Limits(max_sessions=3, max_sessions_per_client=2))
    near, far = link(pair, listener, rule)
    gate = pair.shared.gate
    given = pair.pack(pair.one)
    pair.turn()
    given.is_foreign = True
    assert pair.deliver(given, pair.other) == ([], "")
    pair.settle(pair.one, given)
    given.close()
    pair.turn()
    # That of the one that it has come from goes with that instance; here both have one gate.
    assert gate.sessions(1) == 2
    assert pair.other.holdings.rows[1] == 1
    assert pair.other.row(1)[MOVED_IN] == 1
    gate.let_go(Holdings(), 1, pair.other.session.held_as or 0)
    pass_on(pair, near, far, b"on it goes")
    near.close()
    far.close()
    turning(pair, lambda: not pair.other.relay.sessions)


def test_a_foreign_session_of_an_unknown_rule_is_counted_with_all_that_have_no_row(
    pair: Pair, listener: socket.socket
) -> None:
    link(pair, listener)
    pair.other.pools.in_force = {}
    given = pair.pack(pair.one)
    given.is_foreign = True
    assert pair.deliver(given, pair.other) == ([], "")
    pair.settle(pair.one, given)
    given.close()
    assert pair.other.row(SHARED_ROW)[SESSIONS] == 1
    assert pair.other.session.pool.rule.name == RULE.name


def test_one_that_the_access_rules_there_deny_ends_there(
    pair: Pair, listener: socket.socket
) -> None:
    """They were in force in the taker before it came, and were not where it was."""
    _, far = link(pair, listener)
    denials = Denials(pair.other.relay)
    deny = AccessRule(verdict=Verdict.DENY, pattern="127.0.0.0/8", place=Place("test"))
    config = Config(rules=(RULE,), access=(deny,), settings=Settings(cut_denied=True))
    denials.apply(config, [access_of(config, RULE)])
    pair.move(pair.one, pair.other)
    denials.look()
    pair.turn()
    assert receive_to_reset(far) == b""
    assert ends(pair.other) == {"us/access": 1}


# -- who has them


def test_sessions_that_are_given_back_go_on_where_they_were(
    pair: Pair, listener: socket.socket
) -> None:
    near, far = link(pair, listener)
    given = pair.pack(pair.one)
    near.sendall(b"meanwhile")
    pair.settle(pair.one, given, is_back=True)
    assert not pair.one.mover.is_out
    arrives(pair, far, b"meanwhile")
    assert pair.deliver(given, pair.other) == ([], "claimed")
    assert not pair.other.relay.sessions
    given.close()
    row = pair.one.row(1)
    assert (row[SESSIONS], row[MOVED_OUT], row[MOVED_IN]) == (1, 1, 1)


def test_who_is_killed_before_it_has_said_that_it_takes_them_has_not_counted_them(
    pair: Pair, listener: socket.socket
) -> None:
    """Others get them then, and would count them once more."""
    link(pair, listener)
    given, seen = pair.pack(pair.one), []
    given.send(pair.other.channel)
    (received,) = pair.other.own.receive()
    row, send = pair.other.row(1), pair.other.own.send

    def watched(message: Message, fds: Sequence[int] = ()) -> None:
        seen.append((message["op"], len(pair.other.relay.sessions), row[SESSIONS], row[MOVED_IN]))
        send(message, fds)

    with patch.object(Channel, "send", side_effect=watched):
        pair.other.mover.on_message(received, pair.other.own)
    assert seen == [(Op.TAKEN, 1, 0, 0)]
    assert (row[SESSIONS], row[MOVED_IN]) == (1, 1)
    pair.settle(pair.one, given)
    given.close()


def test_who_has_taken_them_counts_them_also_if_nobody_hears_of_it(
    pair: Pair, listener: socket.socket
) -> None:
    link(pair, listener)
    given = pair.pack(pair.one)
    given.send(pair.other.channel)
    (received,) = pair.other.own.receive()
    pair.other.channel.close()
    pair.other.mover.on_message(received, pair.other.own)
    assert pair.other.row(1)[SESSIONS] == 1
    pair.settle(pair.one, given)
    given.close()


def test_who_is_left_alone_takes_back_what_nobody_has_claimed(
    pair: Pair, listener: socket.socket
) -> None:
    near, far = link(pair, listener)
    given = pair.pack(pair.one)
    given.close()
    pair.one.mover.on_hang_up(pair.one.own)
    pass_on(pair, near, far, b"on it goes")


def test_who_is_left_alone_leaves_others_what_they_have_claimed(
    pair: Pair, listener: socket.socket
) -> None:
    near, far = link(pair, listener)
    given = pair.pack(pair.one)
    assert pair.deliver(given, pair.other) == ([], "")
    given.close()
    pair.one.mover.on_hang_up(pair.one.own)
    assert not pair.one.relay.sessions
    assert not pair.one.mover.is_out
    pass_on(pair, near, far, b"on it goes")


def test_a_worker_that_ends_takes_what_is_out_with_it(pair: Pair, listener: socket.socket) -> None:
    _, far = link(pair, listener)
    given = pair.pack(pair.one)
    pair.one.close()
    given.close()
    pair.turn()
    assert receive_to_reset(far) == b""
    assert ends(pair.one) == {"us/shutdown": 1}


@pytest.mark.parametrize("is_back", [False, True])
def test_one_that_is_refused_may_go_back_while_the_others_go_on(
    pair: Pair, listener: socket.socket, *, is_back: bool
) -> None:
    first = link(pair, listener)
    second = Link(pair.open(side_pool(pair.one)), pair._stack.enter_context(accept(listener)))
    turning(
        pair,
        lambda: all(one.state is SessionState.RELAYING for one in pair.one.relay.sessions),
    )
    given = pair.pack(pair.one)
    sent = given.sessions[1][1]
    whole = sent[0]
    sent[0] = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # no socket: it cannot be taken
    refused, why = pair.deliver(given, pair.other)
    assert (refused, why) == ([1], "nonsense")
    pass_on(pair, *first, b"taken")
    if is_back:
        pair.settle(pair.one, given, refused=refused)
        given.close()
    else:
        os.close(sent[0])
        sent[0] = os.dup(whole)
        rest = given.only(refused)
        assert pair.deliver(rest, pair.other) == ([], "")
        rest.close()
        pair.settle(pair.one, given)
    os.close(whole)
    pass_on(pair, *second, b"as well")
    assert [len(side.relay.sessions) for side in pair.sides] == ([1, 1] if is_back else [0, 2])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda given: setattr(given, "version", 2), "version"),
        (lambda given: given.sessions[0][1].append(os.dup(given.token)), "nonsense"),
        (lambda given: given.sessions[0][1].reverse(), ""),
    ],
    ids=["version", "descriptors", "ends"],
)
def test_what_cannot_be_taken_is_left_to_others(
    pair: Pair, listener: socket.socket, spoil: Callable[[Consignment], object], why: str
) -> None:
    """Refused as a whole it is not claimed, so that the next one can have it."""
    link(pair, listener)
    given = pair.pack(pair.one)
    spoil(given)
    refused, said = pair.deliver(given, pair.other)
    assert (refused, said) == ([0] if why else [], why)
    if refused:
        assert given.claim()
        assert not pair.other.relay.sessions
    pair.settle(pair.one, given)
    given.close()


def test_hostile_sessions_cost_nothing_but_themselves(pair: Pair, listener: socket.socket) -> None:
    """What a taker is told of a session may be anything; no descriptor stays behind."""
    link(pair, listener)
    given = pair.pack(pair.one)
    content = given.read_content()
    (described,) = content["sessions"]  # type: ignore[misc]  # it is a list
    before = len(procfs.descriptors(os.getpid()))
    for key, value in {
        "kind": "nothing",
        "state": "connecting",
        "terms": 7,
        "ending": ["client", "limit", "", True],
        "server": ["no address", 70_000, True],
        "c2u": {"waiting": "pipe"},
        "u2c": {"waiting": "file"},
        "more": {"adopted_at": "never"},
    }.items():
        spoilt = Consignment.of(
            given.number,
            {**content, "sessions": [{**described, key: value}]},  # type: ignore[has-type]
            [[os.dup(fd) for fd in given.sessions[0][1]]],
        )
        assert pair.deliver(spoilt, pair.other) == ([0], "nonsense"), key
        spoilt.close()
        assert not pair.other.relay.sessions
    assert len(procfs.descriptors(os.getpid())) == before
    assert pair.deliver(given, pair.other) == ([], "")
    pair.settle(pair.one, given)
    given.close()


def test_a_session_of_which_nonsense_is_said_is_not_deposited(
    pair: Pair, listener: socket.socket, keeper: Keeper
) -> None:
    """It goes on, and what was said of it does no harm to its taker."""
    link(pair, listener)
    kept = deposit_of(pair.other, keeper)
    given = pair.pack(pair.one)
    content = given.read_content()
    (described,) = content["sessions"]  # type: ignore[misc]  # it is a list
    for key, value in {"adoptions": 1 << 40, "started_at": -1e300}.items():
        spoilt = Consignment.of(
            given.number,
            {**content, "sessions": [{**described, key: value}]},  # type: ignore[has-type]
            [[os.dup(fd) for fd in given.sessions[0][1]]],
        )
        spoilt.send(pair.other.channel)
        pair.other.hear()
        spoilt.close()
    for one in pair.other.answers():
        if one.message.get("op") != "taken":
            keeper.on_message(kept, one)
    assert kept.sessions == 0
    assert len(pair.other.relay.sessions) == 2
    pair.settle(pair.one, given)
    given.close()


def test_a_session_that_has_come_is_not_refused_after_that(
    pair: Pair, listener: socket.socket
) -> None:
    """Its giver would go on with it as well."""
    _, far = link(pair, listener)
    given = pair.pack(pair.one)
    with patch.object(Servers, "take_on", side_effect=ZeroDivisionError):
        assert pair.deliver(given, pair.other) == ([], "")
    pair.settle(pair.one, given)
    given.close()
    pair.turn()
    assert receive_to_reset(far) == b""
    assert ends(pair.other) == {"us/error": 1}


def test_nothing_but_one_consignment_is_out_at_a_time(pair: Pair, listener: socket.socket) -> None:
    link(pair, listener)
    given = pair.pack(pair.one)
    other = pair.pack(pair.one)
    assert (len(other), other.busy) == (0, 1)
    pair.settle(pair.one, other)  # of another number: nothing happens
    assert pair.one.mover.is_out
    pair.settle(pair.one, given, is_back=True)
    given.close()


# -- what is left behind in the giver


def test_nothing_in_the_giver_touches_a_session_again(
    pair: Pair, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about to go on with its bulk, and to be looked at by the wheel."""
    monkeypatch.setattr(Direction, "budget_bytes", 1)  # it yields after each read
    near, far = link(pair, listener)
    near.sendall(bytes(100_000))
    former = pair.one.session
    pair.one.relay.poller.turn()
    turning_one = former.c2u
    assert turning_one.is_queued
    given = pair.pack(pair.one)
    assert not pair.one.relay.bench.wheel
    moved = turning_one.moved
    pair.one.relay.poller.turn()
    pair.one.relay.abort_sessions(Phase.DRAIN, "late", [former])
    pair.loop.pass_time(10_000)
    assert turning_one.moved == moved
    assert pair.deliver(given, pair.other) == ([], "")
    pair.settle(pair.one, given)
    given.close()
    arrives(pair, far, bytes(100_000))


def test_a_unix_socket_on_a_side_goes_along(pair: Pair, tmp_path: Path) -> None:
    """What is sent with descriptors is read apart; the relay must read on, there as well."""
    with listen_unix(str(tmp_path / "up")) as up:
        rule = replace(RULE, upstreams=(Upstream(UnixAddress(str(tmp_path / "up"))),))
        near, far = link(pair, up, rule)
        pair.move(pair.one, pair.other)
        assert pair.other.session.u2c.read_on == pair.other.session.c2u.read_on == ALWAYS
        with socket.socket() as sock:
            socket.send_fds(far, [b"one"], [sock.fileno()])
            far.sendall(b"two")
        arrives(pair, near, b"onetwo")
        pass_on(pair, near, far, b"three")
        near.shutdown(socket.SHUT_WR)
        turning(pair, lambda: pair.other.session.state is SessionState.HALF_CLOSED)
        pair.move(pair.other, pair.one)
        pass_on(pair, far, near, b"four")
        far.close()
        turning(pair, lambda: not pair.one.relay.sessions)
        assert receive_to_end(near) == b""


def test_urgent_data_is_copied_in_the_other_worker_too(pair: Pair, listener: socket.socket) -> None:
    near, far = link(pair, listener)
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pair.one.session.client.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    pair.move(pair.one, pair.other, lambda: near.send(b"!", socket.MSG_OOB))
    near.sendall(seeded(50_000, 3))
    arrives(pair, far, b"!" + seeded(50_000, 3))
    assert not pair.other.session.c2u.read_on & SPLICES
    pair.move(pair.other, pair.one)
    assert not pair.one.session.c2u.read_on & SPLICES
    assert pair.one.session.u2c.read_on & SPLICES


def test_a_unix_socket_is_not_spliced_where_nothing_is(tmp_path: Path) -> None:
    with (
        closing(Pair(RelayMode.AUTO, RelayMode.COPY)) as pair,
        listen_unix(str(tmp_path / "up")) as up,
    ):
        rule = replace(RULE, upstreams=(Upstream(UnixAddress(str(tmp_path / "up"))),))
        link(pair, up, rule)
        pair.move(pair.one, pair.other)
        session = pair.other.session
        assert not (session.u2c.read_on | session.c2u.read_on) & SPLICES


# -- beside a deposit


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """The master's side of deposits."""
    keeper = Keeper(lambda _: None)
    yield keeper
    for one in [*keeper._deposits]:
        keeper.close(one)


def deposit_of(side: Side, keeper: Keeper) -> Deposit:
    """Let a relay deposit its sessions, and what is kept of them."""
    kept = keeper.open()
    side.relay.deposits.join(side.own, kept.memory, side.pools.terms)
    wish(side, keeper, kept, 1.0)
    return kept


def wish(side: Side, keeper: Keeper, kept: Deposit, after_s: float) -> None:
    """Deposit its sessions, or none any more, and let the master hear of it."""
    deposits = side.relay.deposits
    deposits.apply(after_s, side.pools.in_force.values(), side.relay.sessions)
    deposits.flush()
    for one in side.answers():
        keeper.on_message(kept, one)


def test_who_is_to_deposit_again_does(pair: Pair, listener: socket.socket, keeper: Keeper) -> None:
    link(pair, listener)
    kept = deposit_of(pair.one, keeper)
    found = [kept.sessions]
    for after_s in (0.0, 1.0):
        wish(pair.one, keeper, kept, after_s)
        found.append(kept.sessions)
    assert found == [1, 0, 1]


def test_a_session_is_not_deposited_before_it_is_said_to_be_taken(
    pair: Pair, listener: socket.socket, keeper: Keeper
) -> None:
    """Killed in between its worker would leave it twice: to who sent it, and to who keeps it."""
    near, _ = link(pair, listener)
    clog(pair, near, lambda: pair.one.session.c2u.holds_data)
    deposit_of(pair.other, keeper)
    given = pair.pack(pair.one)
    assert len(given.sessions[0][1]) > 2, "no pipe goes along"
    given.send(pair.other.channel)
    pair.other.hear()
    said = pair.other.answers()
    words = [it.message.get("op") or Word(it.raw[0]) for it in said]
    assert words.index("taken") < words.index(Word.KEEP)
    for one in said:
        one.close()
    pair.settle(pair.one, given)
    given.close()


def test_who_gives_up_a_session_says_so_at_once(
    pair: Pair, listener: socket.socket, keeper: Keeper
) -> None:
    """Between the end of its deposit and its dispatch nobody has it: nothing else is done then."""
    link(pair, listener)
    kept = deposit_of(pair.one, keeper)
    number = pair.one.session.client.fileno()
    assert kept.memory.serials[number]
    found: list[tuple[int, int]] = []
    send = Consignment.send

    def look(given: Consignment, channel: Channel) -> None:
        found.append((kept.memory.serials[number], len(pair.one.relay.sessions)))
        send(given, channel)

    with patch.object(Consignment, "send", look):
        pair.pack(pair.one).close()
    assert found == [(0, 1)]
    assert not pair.one.relay.sessions


def test_a_rule_may_have_more_to_say_than_fits_into_a_message(
    pair: Pair, listener: socket.socket, keeper: Keeper
) -> None:
    deny = [
        AccessRule(verdict=Verdict.DENY, pattern=f"10.0.{i >> 8}.{i & 255}", place=Place("test"))
        for i in range(2000)
    ]
    rule = replace(RULE, access=tuple(deny))
    link(pair, listener, rule)
    kept = deposit_of(pair.one, keeper)
    assert kept.sessions == 1
    assert [one.terms for one in kept.terms.values()] == [terms_of(rule)]


def test_what_is_sent_of_rules_is_bounded(
    pair: Pair, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these has two upstreams, and three names are as many as fit."""
    upstreams = RULE.upstreams * 2
    rules = [replace(RULE, name=name, upstreams=upstreams) for name in ("one", "two")]
    pools = [StubPool(rule, (target_of(listener),)) for rule in rules]
    for side in pair.sides:
        side.serve(*pools)
    for pool in pools:
        pair.open(pool)
        pair._stack.enter_context(accept(listener))
    turning(
        pair,
        lambda: [one.state for one in pair.one.relay.sessions] == [SessionState.RELAYING] * 2,
    )
    monkeypatch.setattr(packing, "_MOST_TERMS", 3)
    assert pair.move(pair.one, pair.other) == 1
    assert pair.move(pair.one, pair.other) == 1
    assert len(pair.other.relay.sessions) == 2
