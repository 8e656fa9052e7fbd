"""Sessions of groups of servers: which server they get, and what they do when it fails or is full.

On a clock that the test turns. Whatever happens, nobody holds a server at the end: see ``Shared``.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.by_hand import RACE_AFTER_S, Bench, GroupPool, StubPool, no_names, target_of
from support.clogged import CloggedUpstream
from support.ends import accept, listen, listen_unix, receive_to_reset, reset
from support.forwarder import reserve_port
from support.groups import failed, find, order, servers_of, turning
from support.hosts import own_host

from forwarder.balancing.balancer import MOST_OTHERS
from forwarder.balancing.table import DRAINS, HAS_ORDER, Standing
from forwarder.config.address import parse_listen
from forwarder.config.model import Balance, Upstream
from forwarder.net.sockets import Target, unix_target
from forwarder.relay.group_dialer import AGAIN_S
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import (
    BYTES_C2U,
    CONNECT_BUCKETS,
    CONNECT_MS,
    CONNECTS_FAILED,
    ENDS,
    SESSIONS,
    SESSIONS_TOTAL,
    new_row,
)
from forwarder.upstream.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

SOON_S = 3 * TICK_S
ONE_EACH = {0: {"max_sessions": 1}, 1: {"max_sessions": 1}}


def refusing(stack: ExitStack) -> tuple[Target, ...]:
    """A server that nobody is, and nobody else can be."""
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    return (target_of(sock),)


def silent(stack: ExitStack) -> tuple[Target, ...]:
    """A server that does not answer."""
    return (target_of(stack.enter_context(CloggedUpstream()).listener),)


def at(*socks: socket.socket) -> tuple[Target, ...]:
    return tuple(map(target_of, socks))


def ended(pool: StubPool) -> dict[str, int]:
    return {code: n for i, code in enumerate(REASONS) if (n := pool.counts[ENDS + i])}


def serve(bench: Bench, stack: ExitStack, pool: GroupPool) -> tuple[socket.socket, str]:
    """Open a session, which is connected; returns the client's end, and the server's name."""
    client = stack.enter_context(bench.open(pool))
    session = next(reversed(bench.relay.sessions))
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is not None
    return client, session.server.name


def names(bench: Bench, stack: ExitStack, pool: GroupPool, count: int) -> list[int]:
    """The servers of so many sessions, by their place."""
    every = [server.name for server in servers_of(pool)]
    return [every.index(serve(bench, stack, pool)[1]) for _ in range(count)]


# -- choosing


def test_sessions_are_spread_by_weight(bench: Bench, stack: ExitStack) -> None:
    socks = [stack.enter_context(listen()) for _ in range(3)]
    pool = bench.group(*map(at, socks), changes={1: {"weight": 2}})
    found = names(bench, stack, pool, 8)
    assert sorted(found) == [0, 0, 1, 1, 1, 1, 2, 2]
    assert found[:4] != [0, 0, 1, 1]


def test_least_counts_what_other_workers_have(bench: Bench, stack: ExitStack) -> None:
    socks = [stack.enter_context(listen()) for _ in range(3)]
    pool = bench.group(*map(at, socks), balance=Balance.LEAST)
    holder = bench.relay.restrictions.holder
    for server in servers_of(pool)[:2]:
        for _ in range(2):
            holder.take_server(server.row)
    holder.settle()
    assert names(bench, stack, pool, 3) == [2, 2, 0]
    for server in servers_of(pool)[:2]:
        for _ in range(2):
            holder.leave_server(server.row)


def test_a_client_has_its_server_by_its_address(bench: Bench, stack: ExitStack) -> None:
    socks = [stack.enter_context(listen()) for _ in range(4)]
    pool = bench.group(*map(at, socks), balance=Balance.HASH)
    assert len(set(names(bench, stack, pool, 6))) == 1


def test_what_a_session_counts_for_its_rule_it_counts_for_its_server(
    bench: Bench, stack: ExitStack
) -> None:
    one, other = stack.enter_context(listen()), stack.enter_context(listen())
    pool = bench.group(at(one), at(other), balance=Balance.FIRST)
    client, _ = serve(bench, stack, pool)
    client.sendall(b"12345")
    far = stack.enter_context(accept(one))
    turning(bench, lambda: bool(len(far.recv(5, socket.MSG_PEEK | socket.MSG_DONTWAIT)) == 5))
    counts = servers_of(pool)[0].counts
    assert (counts[SESSIONS], counts[SESSIONS_TOTAL]) == (1, 1)
    assert sum(counts[CONNECT_MS : CONNECT_MS + CONNECT_BUCKETS]) == 1
    reset(client)
    turning(bench, lambda: not bench.relay.sessions)
    assert (counts[SESSIONS], counts[SESSIONS_TOTAL], counts[BYTES_C2U]) == (0, 1, 5)
    assert not any(servers_of(pool)[1].counts)


@pytest.mark.parametrize("balance", [Balance.FIRST, Balance.TURN, Balance.LEAST])
def test_a_server_that_is_down_or_drained_gets_no_session(
    bench: Bench, stack: ExitStack, balance: Balance
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(3)]
    pool = bench.group(*map(at, socks), balance=balance)
    find(bench, pool, 0, Standing.DOWN)
    order(bench, pool, 1, HAS_ORDER | DRAINS)
    assert names(bench, stack, pool, 4) == [2] * 4
    find(bench, pool, 0, Standing.UP)
    assert 0 in names(bench, stack, pool, 4)


# -- servers that fail


def test_another_server_is_tried_at_once(bench: Bench, stack: ExitStack) -> None:
    other = stack.enter_context(listen())
    pool = bench.group(refusing(stack), at(other), balance=Balance.FIRST)
    now = bench.loop.now
    assert names(bench, stack, pool, 1) == [1]
    assert bench.loop.now == now
    assert failed(pool) == [1, 0]
    assert bench.relay.servers.alarm[SESSIONS] == 1
    assert pool.counts[CONNECTS_FAILED] == 0


def test_who_has_just_failed_is_not_asked_first(bench: Bench, stack: ExitStack) -> None:
    """Each worker knows that by itself, before the checker does."""
    other = stack.enter_context(listen())
    pool = bench.group(refusing(stack), at(other), balance=Balance.FIRST)
    assert names(bench, stack, pool, 4) == [1] * 4
    assert failed(pool) == [1, 0]


@pytest.mark.parametrize(
    ("retries", "tried"), [(None, 1 + MOST_OTHERS), (0, 1), (1, 2), (16, 6)], ids=str
)
def test_so_many_others_are_tried_and_no_more(
    bench: Bench, stack: ExitStack, retries: int | None, tried: int
) -> None:
    dead = [refusing(stack) for _ in range(6)]
    pool = bench.group(*dead, retries=retries)
    client = stack.enter_context(bench.open(pool))
    turning(bench, lambda: not bench.relay.sessions)
    assert sum(failed(pool)) == tried
    assert ended(pool) == {"upstream/connect": 1}
    assert pool.counts[CONNECTS_FAILED] == 1
    assert receive_to_reset(client) == b""


def test_the_only_server_is_tried_again_after_a_pause(bench: Bench, stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    pool = bench.group(at(sock), retries=2)
    stack.enter_context(bench.open(pool))
    turning(bench, lambda: failed(pool) == [1])
    bench.loop.pass_time(AGAIN_S - 2 * TICK_S)
    assert failed(pool) == [1]
    sock.listen()
    bench.loop.pass_time(2 * SOON_S)
    (session,) = bench.relay.sessions
    turning(bench, lambda: session.connected_at > 0)


def test_the_only_server_is_not_tried_for_ever(bench: Bench, stack: ExitStack) -> None:
    pool = bench.group(refusing(stack), retries=2)
    stack.enter_context(bench.open(pool))
    for count in (1, 2, 3):
        turning(bench, lambda count=count: failed(pool) == [count])  # type: ignore[misc]
        assert len(bench.relay.sessions) == (count < 3)
        bench.loop.pass_time(AGAIN_S + SOON_S)
    assert ended(pool) == {"upstream/connect": 1}


@pytest.mark.parametrize("kind", [refusing, lambda _: (unix_target("@nobody listens here"),)])
def test_a_client_that_goes_during_the_pause_is_tried_for_no_more(
    bench: Bench, stack: ExitStack, kind: Callable[[ExitStack], tuple[Target, ...]]
) -> None:
    pool = bench.group(kind(stack), retries=2)
    client = bench.open(pool)
    turning(bench, lambda: failed(pool) == [1])
    reset(client)
    turning(bench, lambda: not bench.relay.sessions)
    assert ended(pool) == {"client/connect/reset": 1}


def test_all_addresses_of_a_server_are_tried_before_another_one(
    bench: Bench, stack: ExitStack
) -> None:
    there, other = stack.enter_context(listen()), stack.enter_context(listen())
    pool = bench.group(
        (*refusing(stack), *refusing(stack), *at(there)), at(other), balance=Balance.FIRST
    )
    assert names(bench, stack, pool, 1) == [0]
    assert failed(pool) == [0, 0]


def test_backups_are_for_when_the_others_fail(bench: Bench, stack: ExitStack) -> None:
    there, backup = stack.enter_context(listen()), stack.enter_context(listen())
    pool = bench.group(at(backup), at(there), changes={0: {"is_backup": True}})
    assert names(bench, stack, pool, 3) == [1, 1, 1]
    find(bench, pool, 1, Standing.DOWN)
    assert names(bench, stack, pool, 3) == [0, 0, 0]
    find(bench, pool, 1, Standing.UP)
    assert names(bench, stack, pool, 3) == [1, 1, 1]


def test_a_backup_is_tried_when_a_connect_fails(bench: Bench, stack: ExitStack) -> None:
    backup = stack.enter_context(listen())
    pool = bench.group(at(backup), refusing(stack), changes={0: {"is_backup": True}})
    assert names(bench, stack, pool, 1) == [0]


def test_if_none_is_usable_all_are(bench: Bench, stack: ExitStack) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks))
    for index in range(2):
        find(bench, pool, index, Standing.DOWN)
    assert sorted(names(bench, stack, pool, 4)) == [0, 0, 1, 1]


def test_if_none_is_usable_clients_are_turned_away_where_that_is_wanted(
    bench: Bench, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), fails_open=False)
    for index in range(2):
        find(bench, pool, index, Standing.DOWN)
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(0)
    assert receive_to_reset(client) == b""
    assert ended(pool) == {"us/upstream-down": 1}
    assert "no server of group some group is usable" in caplog.text
    assert failed(pool) == [0, 0]


# -- servers that do not answer


@pytest.mark.parametrize("balance", [Balance.TURN, Balance.LEAST, Balance.RANDOM])
def test_another_server_is_tried_beside_one_that_does_not_answer(
    bench: Bench, stack: ExitStack, balance: Balance
) -> None:
    other = stack.enter_context(listen())
    pool = bench.group(silent(stack), at(other), balance=balance)
    find(bench, pool, 1, Standing.DOWN)
    stack.enter_context(bench.open(pool))
    find(bench, pool, 1, Standing.UP)
    bench.loop.pass_time(RACE_AFTER_S + SOON_S)
    (session,) = bench.relay.sessions
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is servers_of(pool)[1]
    assert failed(pool) == [1, 0]
    assert names(bench, stack, pool, 3) == [1, 1, 1]


@pytest.mark.parametrize("balance", [Balance.FIRST, Balance.HASH])
def test_where_the_choice_matters_there_is_no_race(
    bench: Bench, stack: ExitStack, balance: Balance
) -> None:
    other = stack.enter_context(listen())
    pool = bench.group(silent(stack), at(other), balance=balance, connect_timeout_s=5.0)
    find(bench, pool, 1, Standing.DOWN)
    stack.enter_context(bench.open(pool))
    find(bench, pool, 1, Standing.UP)
    bench.loop.pass_time(5.0 - TICK_S)
    (session,) = bench.relay.sessions
    assert not session.connected_at
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is servers_of(pool)[1]


def test_a_backup_is_no_rival(bench: Bench, stack: ExitStack) -> None:
    backup = stack.enter_context(listen())
    pool = bench.group(
        silent(stack), at(backup), changes={1: {"is_backup": True}}, connect_timeout_s=5.0
    )
    stack.enter_context(bench.open(pool))
    bench.loop.pass_time(5.0 - TICK_S)
    (session,) = bench.relay.sessions
    assert not session.connected_at
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: session.connected_at > 0)


def test_a_server_that_is_down_is_no_rival(bench: Bench, stack: ExitStack) -> None:
    down = stack.enter_context(listen())
    pool = bench.group(silent(stack), at(down))
    find(bench, pool, 1, Standing.DOWN)
    stack.enter_context(bench.open(pool))
    bench.loop.pass_time(9.0)
    (session,) = bench.relay.sessions
    assert not session.connected_at
    assert servers_of(pool)[1].counts[SESSIONS_TOTAL] == 0


@pytest.mark.parametrize("how", ["the client resets", "a kill", "a drain"])
def test_who_ends_during_a_race_holds_no_server(bench: Bench, stack: ExitStack, how: str) -> None:
    pool = bench.group(silent(stack), silent(stack), balance=Balance.LEAST)
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(RACE_AFTER_S + SOON_S)
    assert [server.counts[SESSIONS] for server in servers_of(pool)] == [1, 1]
    if how == "the client resets":
        reset(client)
        turning(bench, lambda: not bench.relay.sessions)
    else:
        bench.relay.abort_sessions(Phase.KILL if how == "a kill" else Phase.DRAIN, how)
        bench.loop.pass_time(0)
    assert [server.counts[SESSIONS] for server in servers_of(pool)] == [0, 0]
    assert failed(pool) == [0, 0]


def test_a_bug_costs_one_session_and_no_server(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = stack.enter_context(listen())
    pool = bench.group(at(other), changes=ONE_EACH)

    def fail(*_: object) -> None:
        raise RuntimeError("the test says so")

    with monkeypatch.context() as patched:
        patched.setattr(pool, "source", fail)
        stack.enter_context(bench.open(pool))
        bench.loop.pass_time(0)
    assert ended(pool) == {"us/error": 1}
    assert names(bench, stack, pool, 1) == [0]


# -- names and unix sockets


def test_a_server_whose_name_is_not_answered_is_passed_over(bench: Bench, stack: ExitStack) -> None:
    other = stack.enter_context(listen())
    pool = bench.group(None, (), at(other))
    assert names(bench, stack, pool, 3) == [2, 2, 2]


def test_a_name_that_is_answered_meanwhile_serves(bench: Bench, stack: ExitStack) -> None:
    """All others have refused by then."""
    late = stack.enter_context(listen())
    pool = bench.group(None, refusing(stack))
    stack.enter_context(bench.open(pool))
    turning(bench, lambda: failed(pool) == [0, 1])
    bench.loop.pass_time(2.0)
    pool.addresses[0] = at(late)
    bench.loop.pass_time(SOON_S)
    (session,) = bench.relay.sessions
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is servers_of(pool)[0]


def test_where_no_name_is_answered_a_session_waits_for_one(bench: Bench, stack: ExitStack) -> None:
    pool = bench.group(None, None)
    stack.enter_context(bench.open(pool))
    bench.loop.pass_time(2.0)
    late = stack.enter_context(listen())
    pool.addresses[1] = at(late)
    pool.waiting.pop()(pool.targets() or ())
    (session,) = bench.relay.sessions
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is servers_of(pool)[1]


def test_a_wait_for_a_name_is_not_for_ever(bench: Bench, stack: ExitStack) -> None:
    pool = bench.group(None, refusing(stack), connect_timeout_s=3.0)
    stack.enter_context(bench.open(pool))
    turning(bench, lambda: failed(pool) == [0, 1])
    bench.loop.pass_time(3.0 + SOON_S)
    assert ended(pool) == {"upstream/connect": 1}


def test_each_port_of_a_range_leads_to_that_of_its_server(bench: Bench, stack: ExitStack) -> None:
    """A server is a range, too; what it counts and what is known of it is of all its ports."""
    hosts = own_host(7), own_host(8)
    first = stack.enter_context(reserve_port(hosts[0])).getsockname()[1]
    there = [stack.enter_context(listen(host, first + 1)) for host in hosts]
    group = bench.group(*((Target(socket.AF_INET, (host, first)),) for host in hosts))
    ends = (Upstream(parse_listen(f"{host}:{first}-{first + 1}")) for host in hosts)
    rule = replace(group.rule, listen=parse_listen("127.0.0.1:1-2"), upstreams=tuple(ends))
    pool = Pool(rule, no_names(), 1, new_row(), group.balancer).at(1)
    pool.local = None
    for _ in range(4):
        stack.enter_context(bench.open(pool))  # type: ignore[arg-type]  # of no stub
    turning(bench, lambda: all(one.connected_at > 0 for one in bench.relay.sessions))
    assert [server.counts[SESSIONS] for server in servers_of(group)] == [2, 2]
    for sock in there:
        for _ in range(2):
            stack.enter_context(accept(sock))


def test_unix_sockets_are_servers_too(
    bench: Bench, stack: ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = str(tmp_path_factory.mktemp("group") / "a")
    stack.enter_context(listen_unix(path))
    pool = bench.group((unix_target("@nobody listens here"),), (unix_target(path),))
    pool.has_unix = True
    assert names(bench, stack, pool, 2) == [1, 1]
    assert failed(pool) == [1, 0]
