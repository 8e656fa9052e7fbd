"""Sessions that wait for a server with room; and those whose server they have to leave.

On a clock that the test turns. Whatever happens, nobody holds a server at the end: see ``Shared``.
"""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.by_hand import Bench, GroupPool, StubPool, pool_of, target_of
from support.ends import listen, receive_to_reset, reset
from support.groups import failed, find, look, order, servers_of, turning
from support.logged import read_json

from forwarder.balancing.balancer import RETURN_S
from forwarder.balancing.table import CUTS, DRAINS, HAS_ORDER, Standing
from forwarder.config.model import Balance, LogFormat, OnDown, OnUp
from forwarder.limits.gate import STUCK_S, Holder, Holdings
from forwarder.relay.listing import describe
from forwarder.relay.servers import SERVES_S
from forwarder.relay.wheel import TICK_S
from forwarder.stats.board import ROWS
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import ENDS, SESSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from forwarder.net.sockets import Target
    from forwarder.relay.session import Session

SOON_S = 3 * TICK_S
ONE_EACH = {0: {"max_sessions": 1}, 1: {"max_sessions": 1}}


def at(sock: socket.socket) -> tuple[Target, ...]:
    return (target_of(sock),)


def full(bench: Bench, stack: ExitStack, servers: int = 1, **group: object) -> GroupPool:
    """A group whose servers take one session each; all have it."""
    socks = [stack.enter_context(listen()) for _ in range(servers)]
    pool = bench.group(*map(at, socks), changes=ONE_EACH, **group)  # type: ignore[arg-type]
    for _ in range(servers):
        serve(bench, stack, pool)
    return pool


def begin(bench: Bench, stack: ExitStack, pool: StubPool) -> tuple[socket.socket, Session]:
    client = stack.enter_context(bench.open(pool))
    return client, next(reversed(bench.relay.sessions))


def serve(bench: Bench, stack: ExitStack, pool: StubPool) -> tuple[socket.socket, Session]:
    client, session = begin(bench, stack, pool)
    turning(bench, lambda: session.connected_at > 0)
    return client, session


def end(bench: Bench, session: Session) -> None:
    bench.relay.abort_sessions(Phase.KILL, "the test", [session])
    bench.loop.pass_time(0)


def ended(pool: StubPool) -> dict[str, int]:
    return {code: n for i, code in enumerate(REASONS) if (n := pool.counts[ENDS + i])}


def waiting(bench: Bench, pool: GroupPool) -> int:
    """How many sessions of a group wait, as all workers see it."""
    assert pool.balancer is not None
    return bench.shared.gate.sessions(pool.balancer.row)


@contextmanager
def held_by_another(bench: Bench) -> Iterator[None]:
    """Another process has the lock of the gate."""
    mine, its = socket.socketpair()
    pid = os.fork()
    if not pid:
        fcntl.lockf(bench.shared.gate.fileno(), fcntl.LOCK_EX)
        its.send(b"x")
        mine.close()
        its.recv(1)
        os._exit(0)
    with mine, its:
        mine.recv(1)
        yield
    os.waitpid(pid, 0)


# -- all servers are full


@pytest.mark.parametrize("balance", list(Balance))
def test_a_server_gets_no_more_sessions_than_it_may_have(
    bench: Bench, stack: ExitStack, balance: Balance
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(3)]
    limits = {0: {"max_sessions": 2}, 1: {"max_sessions": 1}, 2: {"max_sessions": 3}}
    pool = bench.group(*map(at, socks), changes=limits, balance=balance)
    for _ in range(6):
        serve(bench, stack, pool)
    assert [server.counts[SESSIONS] for server in servers_of(pool)] == [2, 1, 3]
    client, _ = begin(bench, stack, pool)
    bench.loop.pass_time(0)
    assert receive_to_reset(client) == b""
    assert ended(pool) == {"us/limit": 1}
    assert failed(pool) == [0, 0, 0]


def test_who_waits_gets_the_first_place_that_is_free(bench: Bench, stack: ExitStack) -> None:
    """In the order in which they have come, whoever comes in between."""
    pool = full(bench, stack, max_queue=3)
    (first,) = bench.relay.sessions
    others = [begin(bench, stack, pool)[1] for _ in range(3)]
    bench.loop.pass_time(1.0)
    assert waiting(bench, pool) == 3
    before = first
    for position, session in enumerate(others):
        assert [one.connected_at > 0 for one in others[position:]] == [False] * (3 - position)
        end(bench, before)
        turning(bench, lambda session=session: session.connected_at > 0)  # type: ignore[misc]
        before = session
    assert waiting(bench, pool) == 0
    assert servers_of(pool)[0].counts[SESSIONS] == 1


def test_a_place_is_not_free_before_its_socket_is_closed(bench: Bench, stack: ExitStack) -> None:
    pool = full(bench, stack, max_queue=1)
    (first,) = bench.relay.sessions
    _, other = begin(bench, stack, pool)
    upstream = first.upstream
    assert upstream is not None
    bench.relay.abort_sessions(Phase.KILL, "the test", [first])
    assert upstream.fileno() >= 0
    assert bench.shared.gate.sessions(servers_of(pool)[0].row) == 1
    bench.loop.pass_time(0)
    turning(bench, lambda: other.connected_at > 0)


def test_the_queue_has_an_end(bench: Bench, stack: ExitStack) -> None:
    pool = full(bench, stack, max_queue=2)
    for _ in range(2):
        begin(bench, stack, pool)
    client, _ = begin(bench, stack, pool)
    bench.loop.pass_time(0)
    assert receive_to_reset(client) == b""
    assert (ended(pool), waiting(bench, pool)) == ({"us/limit": 1}, 2)


def test_the_queue_is_as_long_as_it_may_be_over_all_workers(bench: Bench, stack: ExitStack) -> None:
    """Another worker has some that wait."""
    pool = full(bench, stack, max_queue=2)
    assert pool.balancer is not None
    other = Holder(bench.shared.gate, Holdings())
    other.take_server(pool.balancer.row)
    other.settle()
    begin(bench, stack, pool)
    begin(bench, stack, pool)
    bench.loop.pass_time(0)
    assert (ended(pool), waiting(bench, pool)) == ({"us/limit": 1}, 2)
    other.leave_server(pool.balancer.row)
    other.settle()


def test_who_comes_while_a_place_is_left_to_other_workers_does_not_take_it(
    bench: Bench, stack: ExitStack
) -> None:
    """Another worker will notice the place within a tick; so who comes waits for one."""
    pool = full(bench, stack, max_queue=2)
    assert pool.balancer is not None
    other = Holder(bench.shared.gate, Holdings())
    other.take_server(pool.balancer.row)
    other.settle()
    (first,) = bench.relay.sessions
    end(bench, first)
    _, session = begin(bench, stack, pool)
    assert servers_of(pool)[0].counts[SESSIONS] == 0
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: session.connected_at > 0)
    end(bench, session)
    _, session = begin(bench, stack, pool)
    assert servers_of(pool)[0].counts[SESSIONS] == 1, "its own again, for a while"
    other.leave_server(pool.balancer.row)
    other.settle()


def test_room_that_another_worker_makes_is_found(bench: Bench, stack: ExitStack) -> None:
    pool = bench.group(at(stack.enter_context(listen())), changes=ONE_EACH, max_queue=2)
    other = Holder(bench.shared.gate, Holdings())
    other.take_server(servers_of(pool)[0].row)
    other.settle()
    _, session = begin(bench, stack, pool)
    bench.loop.pass_time(1.0)
    assert not session.connected_at
    other.leave_server(servers_of(pool)[0].row)
    other.settle()
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: session.connected_at > 0)


@pytest.mark.parametrize("queue_timeout_s", [3.0, None], ids=["its own", "connect_timeout"])
def test_nobody_waits_for_longer_than_one_may(
    bench: Bench, stack: ExitStack, queue_timeout_s: float | None
) -> None:
    pool = full(bench, stack, max_queue=2, queue_timeout_s=queue_timeout_s, connect_timeout_s=3.0)
    client, session = begin(bench, stack, pool)
    bench.loop.pass_time(3.0 - TICK_S)
    assert session in bench.relay.sessions
    bench.loop.pass_time(SOON_S)
    assert receive_to_reset(client) == b""
    assert (ended(pool), waiting(bench, pool)) == ({"us/limit": 1}, 0)


@pytest.mark.parametrize("how", ["the client resets", "it has said something", "a kill"])
def test_who_goes_while_it_waits_makes_room_in_the_queue(
    bench: Bench, stack: ExitStack, how: str
) -> None:
    pool = full(bench, stack, max_queue=1)
    client, session = begin(bench, stack, pool)
    before = len(procfs.descriptors(os.getpid()))
    if how == "a kill":
        end(bench, session)
    else:
        if how == "it has said something":
            client.sendall(b"request")
            bench.relay.poller.turn()
        reset(client)
        turning(bench, lambda: session not in bench.relay.sessions)
        assert ended(pool) == {"client/connect/reset": 1}
        before -= 1  # the client's own
    assert waiting(bench, pool) == 0
    assert len(procfs.descriptors(os.getpid())) == before - 1, "it has had no upstream"
    begin(bench, stack, pool)
    assert waiting(bench, pool) == 1


def test_who_ends_while_it_waits_keeps_its_place(bench: Bench, stack: ExitStack) -> None:
    """By FIN: it may wait for its answer."""
    pool = full(bench, stack, max_queue=1)
    client, session = begin(bench, stack, pool)
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    for _ in range(3):
        bench.relay.poller.turn()
        bench.loop.pass_time(TICK_S)
    assert session in bench.relay.sessions
    assert waiting(bench, pool) == 1


def test_what_a_client_says_while_it_waits_arrives(bench: Bench, stack: ExitStack) -> None:
    sock = stack.enter_context(listen())
    pool = bench.group(at(sock), changes=ONE_EACH, max_queue=1)
    _, first = serve(bench, stack, pool)
    stack.enter_context(sock.accept()[0])
    client, session = begin(bench, stack, pool)
    client.sendall(b"request")
    bench.relay.poller.turn()
    end(bench, first)
    turning(bench, lambda: session.connected_at > 0)
    far = stack.enter_context(sock.accept()[0])
    far.setblocking(False)
    found = bytearray()

    def has_come() -> bool:
        with suppress(BlockingIOError):
            found.extend(far.recv(100))
        return found == b"request"

    turning(bench, has_come)


def test_who_waits_hears_that_no_server_is_usable(bench: Bench, stack: ExitStack) -> None:
    pool = full(bench, stack, max_queue=1, fails_open=False)
    client, _ = begin(bench, stack, pool)
    find(bench, pool, 0, Standing.DOWN)
    bench.loop.pass_time(SOON_S)
    assert receive_to_reset(client) == b""
    assert (ended(pool), waiting(bench, pool)) == ({"us/upstream-down": 1}, 0)


def test_who_waits_is_served_when_another_server_is_up(bench: Bench, stack: ExitStack) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), changes=ONE_EACH, max_queue=1)
    find(bench, pool, 1, Standing.DOWN)
    serve(bench, stack, pool)
    _, session = begin(bench, stack, pool)
    bench.loop.pass_time(1.0)
    find(bench, pool, 1, Standing.UP)
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is servers_of(pool)[1]


def test_a_stuck_lock_costs_time_and_nothing_else(bench: Bench, stack: ExitStack) -> None:
    """Another process has the lock of the gate, while sessions begin, wait, and end."""
    pool = full(bench, stack, max_queue=3)
    (first,) = bench.relay.sessions
    with held_by_another(bench):
        _, one = begin(bench, stack, pool)
        end(bench, first)
        _, other = begin(bench, stack, pool)
        bench.loop.pass_time(1.0)
        assert one.connected_at == other.connected_at == 0
    bench.loop.pass_time(1.0)
    turning(bench, lambda: one.connected_at > 0 or other.connected_at > 0)
    assert servers_of(pool)[0].counts[SESSIONS] == 1


def test_now_and_then_a_place_is_left_to_those_who_wait_in_other_workers(
    bench: Bench, stack: ExitStack
) -> None:
    """Else they would wait until nobody waits here any more."""
    pool = full(bench, stack, max_queue=9)
    (before,) = bench.relay.sessions
    waits = [begin(bench, stack, pool)[1] for _ in range(6)]
    assert pool.balancer is not None
    server = servers_of(pool)[0]
    other = Holder(bench.shared.gate, Holdings())
    other.take_server(pool.balancer.row)
    other.settle()
    end(bench, before)
    other.leave_server(pool.balancer.row)
    other.take_server(server.row)
    other.settle()
    bench.loop.pass_time(2 * TICK_S)
    assert not waits[0].connected_at, "the other worker has taken it"
    other.take_server(pool.balancer.row)
    other.leave_server(server.row)
    other.settle()
    bench.loop.pass_time(2 * TICK_S)
    for session in waits[:3]:  # there is no turn of others so soon
        turning(bench, lambda session=session: session.connected_at > 0)  # type: ignore[misc]
        end(bench, session)
    turning(bench, lambda: waits[3].connected_at > 0)
    bench.loop.pass_time(SERVES_S)
    end(bench, waits[3])
    assert not waits[4].connected_at
    assert bench.shared.gate.sessions(server.row) == 0
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: waits[4].connected_at > 0)
    other.leave_server(pool.balancer.row)
    other.settle()


# -- servers that have to be left


def test_sessions_of_a_server_that_a_check_finds_down_are_cut_where_that_is_wanted(
    bench: Bench, stack: ExitStack
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), on_down=OnDown.RESET, balance=Balance.LEAST)
    clients = [serve(bench, stack, pool) for _ in range(4)]
    down = servers_of(pool)[0]
    find(bench, pool, 0, Standing.DOWN)
    look(bench, pool)
    for client, session in clients:
        if session.server is None:
            assert receive_to_reset(client) == b""
    assert {session.server for session in bench.relay.sessions} == {servers_of(pool)[1]}
    assert ended(pool) == {"us/upstream-down": 2}
    bench.loop.pass_time(2 * STUCK_S)
    assert (down.counts[SESSIONS], bench.shared.gate.sessions(down.row)) == (0, 0)


@pytest.mark.parametrize("standing", [Standing.DOWN, Standing.EJECTED])
def test_sessions_go_on_where_nothing_else_is_wanted(
    bench: Bench, stack: ExitStack, standing: Standing
) -> None:
    on_down = OnDown.KEEP if standing is Standing.DOWN else OnDown.RESET
    pool = bench.group(at(stack.enter_context(listen())), on_down=on_down)
    serve(bench, stack, pool)
    find(bench, pool, 0, standing)
    look(bench, pool)
    assert len(bench.relay.sessions) == 1


def test_a_drained_server_keeps_its_sessions_unless_they_are_to_be_cut(
    bench: Bench, stack: ExitStack
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), balance=Balance.FIRST)
    serve(bench, stack, pool)
    order(bench, pool, 0, HAS_ORDER | DRAINS)
    look(bench, pool)
    assert len(bench.relay.sessions) == 1
    order(bench, pool, 0, HAS_ORDER | DRAINS | CUTS)
    look(bench, pool)
    assert ended(pool) == {"us/upstream-down": 1}


def test_sessions_of_backups_are_cut_bit_by_bit_where_they_have_to_return(
    bench: Bench, stack: ExitStack
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), changes={1: {"is_backup": True}}, on_up=OnUp.RETURN)
    find(bench, pool, 0, Standing.DOWN)
    look(bench, pool)
    for _ in range(10):
        serve(bench, stack, pool)
    assert {session.server for session in bench.relay.sessions} == {servers_of(pool)[1]}
    find(bench, pool, 0, Standing.UP)
    left = []
    for _ in range(int(RETURN_S) + 2):
        look(bench, pool)
        left.append(len(bench.relay.sessions))
        bench.loop.pass_time(1.0)
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert len(set(left)) > 4
    assert ended(pool) == {"us/upstream-down": 10}


# -- reloads


def put_in_force(bench: Bench, pool: StubPool | None, former: GroupPool) -> None:
    """What a worker does in a reload that leaves nothing to choose."""
    assert former.balancer is not None
    former.balancer.is_retired = True
    pools = {} if pool is None else {pool.rule.name: pool}
    bench.relay.servers.apply(pools, bench.relay.sessions)


def shown(session: Session) -> dict[str, object]:
    """A session as in the list."""
    return describe(session, 0.0)


def changed(bench: Bench, pool: GroupPool, rows: Sequence[int] = (), **group: object) -> GroupPool:
    """The same servers after a reload."""
    again = bench.group(*pool.addresses, former=pool.balancer, rows=rows, **group)  # type: ignore[arg-type]
    bench.relay.servers.apply({again.rule.name: again}, bench.relay.sessions)
    return again


def test_who_waits_gets_the_room_that_a_reload_makes(bench: Bench, stack: ExitStack) -> None:
    pool = full(bench, stack, max_queue=2)
    waits = [begin(bench, stack, pool)[1] for _ in range(2)]
    again = changed(bench, pool, changes={0: {"max_sessions": 2}}, max_queue=2)
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: waits[0].connected_at > 0)
    assert not waits[1].connected_at
    assert servers_of(again)[0].counts[SESSIONS] == 2
    assert waiting(bench, again) == 1


def test_sessions_from_before_a_reload_count_and_are_cut(bench: Bench, stack: ExitStack) -> None:
    pool = bench.group(at(stack.enter_context(listen())))
    serve(bench, stack, pool)
    again = changed(bench, pool, changes=ONE_EACH, on_down=OnDown.RESET)
    bench.loop.pass_time(0)
    client, _ = begin(bench, stack, again)
    bench.loop.pass_time(0)
    assert receive_to_reset(client) == b""
    assert ended(again) == {"us/limit": 1}
    find(bench, again, 0, Standing.DOWN)
    look(bench, again)
    assert ended(pool) == {"us/upstream-down": 1}


def test_sessions_count_where_their_group_has_another_name(bench: Bench, stack: ExitStack) -> None:
    pool = bench.group(at(stack.enter_context(listen())), changes=ONE_EACH, max_queue=1)
    _, session = serve(bench, stack, pool)
    _, waits = begin(bench, stack, pool)
    again = changed(bench, pool, changes=ONE_EACH, max_queue=1, rows=range(ROWS + 11, ROWS + 13))
    bench.loop.pass_time(SOON_S)
    assert waiting(bench, pool) == 0
    assert waiting(bench, again) == 1
    assert servers_of(pool)[0].counts[SESSIONS] == 0
    assert servers_of(again)[0].counts[SESSIONS] == 1
    end(bench, session)
    turning(bench, lambda: waits.connected_at > 0)
    assert servers_of(again)[0].counts[SESSIONS] == 1


def test_a_session_is_called_by_the_group_that_it_counts_for(
    bench: Bench, stack: ExitStack, tmp_path: Path
) -> None:
    """In the list and in the log, one that has a server and one that looks for one."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    bench.relay.books.connlog.set_places([(LogFormat.JSON, "log", fd)])
    pool = bench.group(at(stack.enter_context(listen())), name="old", changes=ONE_EACH, max_queue=1)
    _, served = serve(bench, stack, pool)
    _, waits = begin(bench, stack, pool)
    plain = pool_of(at(stack.enter_context(listen())), 10.0)
    _, unchosen = serve(bench, stack, plain)
    rows = range(ROWS + 11, ROWS + 13)
    changed(bench, pool, changes=ONE_EACH, max_queue=1, rows=rows, name="new")
    listed = {it["id"]: (it["group"], it["server"]) for it in map(shown, (served, waits, unchosen))}
    server = servers_of(pool)[0].name
    assert list(listed.values()) == [("new", server), ("new", None), (None, None)]
    end(bench, waits)
    end(bench, served)
    end(bench, unchosen)
    bench.relay.books.connlog.close()
    logged = {it["id"]: (it.get("group"), it.get("server")) for it in read_json(path)}
    assert logged == listed


def test_who_waits_in_a_group_that_is_gone_waits_no_longer(bench: Bench, stack: ExitStack) -> None:
    pool = full(bench, stack, max_queue=2)
    client, _ = begin(bench, stack, pool)
    put_in_force(bench, None, pool)
    bench.loop.pass_time(SOON_S)
    assert receive_to_reset(client) == b""
    assert waiting(bench, pool) == 0


def test_sessions_of_a_rule_that_becomes_a_group_are_cut_though_it_was_down_before(
    bench: Bench, stack: ExitStack
) -> None:
    """The checker may be faster than this worker."""
    sock = stack.enter_context(listen())
    plain = pool_of(at(sock), 10.0)
    serve(bench, stack, plain)
    known = bench.group(at(sock), on_down=OnDown.RESET)
    find(bench, known, 0, Standing.DOWN)
    pool = bench.group(at(sock), on_down=OnDown.RESET)
    bench.relay.servers.apply({pool.rule.name: pool}, bench.relay.sessions)
    look(bench, pool)
    assert ended(plain) == {"us/upstream-down": 1}


@pytest.mark.parametrize("on_down", list(OnDown))
def test_sessions_of_a_rule_that_becomes_a_group_are_those_of_the_server_that_they_have(
    bench: Bench, stack: ExitStack, on_down: OnDown
) -> None:
    """It has had one upstream so far, and no check."""
    sock, other = stack.enter_context(listen()), stack.enter_context(listen())
    plain = pool_of(at(sock), 10.0)
    serve(bench, stack, plain)
    serve(bench, stack, plain)
    pool = bench.group(at(other), at(sock), balance=Balance.LEAST, on_down=on_down)
    bench.relay.servers.apply({pool.rule.name: pool}, bench.relay.sessions)
    bench.loop.pass_time(0)
    assert [server.counts[SESSIONS] for server in servers_of(pool)] == [0, 2]
    found = [serve(bench, stack, pool)[1].server for _ in range(2)]
    assert found == [servers_of(pool)[0]] * 2
    find(bench, pool, 1, Standing.DOWN)
    look(bench, pool)
    assert ended(plain) == ({"us/upstream-down": 2} if on_down is OnDown.RESET else {})


def test_sessions_of_a_group_that_becomes_a_plain_rule_give_their_servers_back(
    bench: Bench, stack: ExitStack
) -> None:
    pool = full(bench, stack)
    plain = pool_of(tuple(one for found in pool.addresses for one in found or ()), 10.0)
    put_in_force(bench, plain, pool)
    (session,) = bench.relay.sessions
    server = session.server
    assert server is not None
    end(bench, session)
    assert (server.counts[SESSIONS], bench.shared.gate.sessions(server.row)) == (0, 0)


def test_who_waits_is_served_where_a_reload_leaves_nothing_to_choose(
    bench: Bench, stack: ExitStack
) -> None:
    pool = full(bench, stack, max_queue=2)
    waits = [begin(bench, stack, pool)[1] for _ in range(2)]
    plain = pool_of(tuple(one for found in pool.addresses for one in found or ()), 10.0)
    put_in_force(bench, plain, pool)
    bench.loop.pass_time(SOON_S)
    turning(bench, lambda: all(session.connected_at > 0 for session in waits))
    assert waiting(bench, pool) == 0


def test_a_server_that_goes_down_while_it_is_connected_to_gets_no_session(
    bench: Bench, stack: ExitStack
) -> None:
    """Its sessions were cut a moment before, so this one would be missed."""
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), balance=Balance.FIRST, on_down=OnDown.RESET)
    _, session = begin(bench, stack, pool)
    find(bench, pool, 0, Standing.DOWN)
    look(bench, pool)
    turning(bench, lambda: session.connected_at > 0)
    assert session.server is servers_of(pool)[1]


@pytest.mark.parametrize("other", ["is drained", "refuses"])
def test_a_server_that_is_down_serves_where_no_other_one_can(
    bench: Bench, stack: ExitStack, other: str
) -> None:
    """Its sessions are cut when it goes down, not those that come later because all else failed."""
    down, away = stack.enter_context(listen()), stack.enter_context(socket.socket())
    away.bind(("127.0.0.1", 0))
    pool = bench.group(at(down), at(away), on_down=OnDown.RESET)
    find(bench, pool, 0, Standing.DOWN)
    if other == "is drained":
        order(bench, pool, 1, HAS_ORDER | DRAINS)
    look(bench, pool)
    _, session = serve(bench, stack, pool)
    assert session.server is servers_of(pool)[0]
    look(bench, pool)
    assert len(bench.relay.sessions) == 1


def test_where_all_are_down_a_session_is_none_that_was_missed(
    bench: Bench, stack: ExitStack
) -> None:
    socks = [stack.enter_context(listen()) for _ in range(2)]
    pool = bench.group(*map(at, socks), on_down=OnDown.RESET)
    for index in range(2):
        find(bench, pool, index, Standing.DOWN)
    look(bench, pool)
    serve(bench, stack, pool)
    assert failed(pool) == [0, 0]


def test_who_has_just_failed_is_tried_before_a_client_is_turned_away(
    bench: Bench, stack: ExitStack
) -> None:
    """All others are full, and there is no queue."""
    sock, back = stack.enter_context(listen()), stack.enter_context(socket.socket())
    back.bind(("127.0.0.1", 0))
    pool = bench.group(at(back), at(sock), changes={1: {"max_sessions": 1}}, balance=Balance.FIRST)
    assert serve(bench, stack, pool)[1].server is servers_of(pool)[1]
    assert failed(pool) == [1, 0]
    back.listen()
    assert serve(bench, stack, pool)[1].server is servers_of(pool)[0]
