"""The balancer of a group: what the table says, what is tried and full, and who has to go."""

from __future__ import annotations

import multiprocessing
import os
import random
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.balancing.balancer import GUESSES_AFTER_S, RETURN_S, Balancer, Surroundings
from forwarder.balancing.table import (
    CUTS,
    DISABLED,
    DRAINS,
    FULL,
    HAS_ORDER,
    HAS_WEIGHT,
    ServerTable,
    Standing,
)
from forwarder.config.address import Address
from forwarder.config.model import Balance, Check, CheckKind, Group, OnDown, OnUp, Upstream
from forwarder.limits.gate import Busy, Gate, Holder, Holdings
from forwarder.net.sockets import packed_host
from forwarder.stats.board import ROWS
from forwarder.stats.rows import SESSIONS, new_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forwarder.balancing.server import Server
    from forwarder.stats.rows import Row

CLIENT = bytes((192, 0, 2, 1))
DRAIN, DISABLE = HAS_ORDER | DRAINS, HAS_ORDER | DRAINS | DISABLED


class Bench:
    """What a worker has around its balancers, and the table as master and checker write it."""

    def __init__(self) -> None:
        self.table = ServerTable()
        self.gate = Gate()
        self.holder = Holder(self.gate, Holdings())
        self.now = 100.0
        self.rows: dict[int, Row] = {}
        self.settlings = 0
        self.moments = count(1)
        self.surroundings = Surroundings(
            table=self.table,
            row_of=lambda row: self.rows.setdefault(row, new_row()),
            holder=self.holder,
            settle_soon=self.settle_soon,
            draw=random.Random(1).random,
            clock=lambda: self.now,
        )

    def close(self) -> None:
        del self.surroundings  # it refers to this, and so to memory that has a descriptor
        self.gate.close()
        self.table.close()

    def settle_soon(self) -> None:
        self.settlings += 1

    def balancer(
        self, *upstreams: Upstream, group: Group | None = None, former: Balancer | None = None
    ) -> Balancer:
        """Of a group whose rows are the first ones of servers."""
        rows = range(ROWS + 1, ROWS + len(upstreams) + 2)
        return Balancer(group or Group(), upstreams, rows, self.surroundings, former)

    def find(self, server: int, standing: Standing, share: int | None = None) -> None:
        """As the checker does; it is down for another reason each time."""
        if share is None:
            share = FULL if standing is Standing.UP else 0
        self.table.find(server + 1, standing, share, next(self.moments))

    def order(self, server: int, order: int) -> None:
        """As the master does."""
        self.table.order(server + 1, order)

    def sessions(self, server: int) -> int:
        """How many a server has, for all workers."""
        assert self.holder.settle()
        return self.gate.sessions(ROWS + 1 + server)


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


def upstream(
    number: int = 1, weight: int = 1, *, is_backup: bool = False, most: int = 0
) -> Upstream:
    end = Address(host=f"10.0.0.{number}", port=80)
    return Upstream(end, weight=weight, is_backup=is_backup, max_sessions=most)


def some(count: int, most: int = 0) -> list[Upstream]:
    return [upstream(number, most=most) for number in range(1, count + 1)]


def indices(servers: Sequence[Server | None]) -> list[int | None]:
    return [None if server is None else server.index for server in servers]


def choices(balancer: Balancer, count: int, tried: int = 0, avoid: int = 0) -> list[int | None]:
    return indices([balancer.choose(CLIENT, tried, avoid) for _ in range(count)])


# -- which one


def test_all_ways_to_choose(bench: Bench) -> None:
    for balance in Balance:
        balancer = bench.balancer(*some(3), group=Group(balance=balance))
        assert balancer.needs_key == (balance is Balance.HASH)
        servers = [balancer.choose(CLIENT, 0, 0) for _ in range(6)]
        assert set(servers) <= set(balancer.servers)
        chosen = len(set(servers))
        assert chosen == (3 if balance in (Balance.TURN, Balance.LEAST, Balance.RANDOM) else 1)
        is_counted = balance in (Balance.LEAST, Balance.RANDOM)
        assert sum(map(bench.sessions, range(3))) == (6 if is_counted else 0)
        for server in servers:
            assert server is not None
            balancer.let_go(server)
        assert sum(map(bench.sessions, range(3))) == 0
        assert bool(bench.settlings) == is_counted
        bench.settlings = 0


@given(st.data())
def test_a_server_is_chosen_where_it_may_be(data: st.DataObject) -> None:
    """Against the rules in other words: who is usable, then who of these."""
    with closing(Bench()) as bench:
        size = data.draw(st.integers(1, 5))
        bits = st.lists(st.booleans(), min_size=size, max_size=size)
        backups, ups, drained = data.draw(bits), data.draw(bits), data.draw(bits)
        weights = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
        fails_open, balance = data.draw(st.booleans()), data.draw(st.sampled_from(Balance))
        balancer = bench.balancer(
            *(
                upstream(number, weight, is_backup=is_backup)
                for number, (weight, is_backup) in enumerate(zip(weights, backups, strict=True))
            ),
            group=Group(fails_open=fails_open, balance=balance),
        )
        for index in range(size):
            bench.order(index, DRAIN if drained[index] else 0)
            bench.find(index, Standing.UP if ups[index] else Standing.DOWN)
        may = {index for index in range(size) if not drained[index]}
        usable = {index for index in may if ups[index]}

        def tier(index: int) -> int:
            return 2 if not weights[index] else int(backups[index])

        for _ in range(4):
            tried, avoid = (data.draw(st.integers(0, 2**size - 1)) for _ in range(2))
            left = {index for index in usable if not tried >> index & 1}
            if not left and fails_open:
                left = {index for index in may if not tried >> index & 1}
            left = {index for index in left if not avoid >> index & 1} or left
            best = {index for index in left if tier(index) == min(map(tier, left))}
            server = balancer.choose(CLIENT, tried, avoid)
            assert server is None if not best else server is not None and server.index in best
            assert server is not None or not (balancer.is_full or balancer.is_unknown)


def test_what_the_table_says_counts_from_the_next_session_on(bench: Bench) -> None:
    balancer = bench.balancer(*some(3))
    assert choices(balancer, 3) == [0, 1, 2]
    bench.find(1, Standing.DOWN)
    assert set(choices(balancer, 6)) == {0, 2}
    bench.order(0, DRAIN)
    assert choices(balancer, 3) == [2, 2, 2]
    bench.find(1, Standing.UP)
    bench.order(0, HAS_ORDER | HAS_WEIGHT | 3)
    assert sorted(choices(balancer, 5), key=str) == [0, 0, 0, 1, 2]
    bench.order(2, DISABLE)
    bench.find(0, Standing.EJECTED)
    assert choices(balancer, 2) == [1, 1]
    bench.find(1, Standing.DOWN)
    assert set(choices(balancer, 8)) == {0, 1}  # open, but not to who is out


def test_what_is_said_of_other_groups_is_of_no_account(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is worked out again, however often servers of other groups come and go."""
    balancer = bench.balancer(*some(2))
    bench.find(0, Standing.SLOW, 500)
    assert choices(balancer, 3) == [1, 0, 1]
    calls: list[object] = []
    monkeypatch.setattr("forwarder.balancing.balancer.rank", lambda *_, **__: calls.append(1))
    bench.find(7, Standing.DOWN)
    bench.order(8, DRAIN)
    assert choices(balancer, 3) == [1, 0, 1]
    assert not calls


def test_nonsense_in_the_table_is_no_more_than_much_weight(bench: Bench) -> None:
    balancer = bench.balancer(*some(2), group=Group(balance=Balance.RANDOM))
    bench.find(0, Standing.SLOW, 2**64 - 2)
    for _ in range(100):
        assert balancer.choose(CLIENT, 0, 0) in balancer.servers


def test_what_is_usable_and_what_is_left(bench: Bench) -> None:
    balancer = bench.balancer(*some(3))
    assert balancer.usable == balancer.choosable == 0b111
    bench.find(0, Standing.DOWN)
    bench.order(1, DRAIN)
    assert balancer.usable == balancer.choosable == 0b100
    bench.find(2, Standing.EJECTED)
    assert (balancer.usable, balancer.choosable) == (0, 0b101)
    closed = bench.balancer(*some(3), group=Group(fails_open=False))
    assert (closed.usable, closed.choosable) == (0, 0)
    assert [closed.is_down(server) for server in closed.servers] == [True, False, True]


def test_who_has_tried_all_that_are_up_tries_the_others(bench: Bench) -> None:
    """What a check or failed connects say may be out of date; the client has nothing to lose."""
    balancer = bench.balancer(*some(3))
    bench.find(1, Standing.DOWN)
    bench.find(2, Standing.EJECTED)
    assert choices(balancer, 2) == [0, 0]
    assert sorted(choices(balancer, 2, tried=0b001), key=str) == [1, 2]
    assert choices(balancer, 1, tried=0b001, avoid=0b010) == [2]
    assert choices(balancer, 1, tried=0b101, avoid=0b010) == [1]
    assert choices(balancer, 1, tried=0b111) == [None]
    balancer = bench.balancer(*some(3), group=Group(fails_open=False))
    assert choices(balancer, 1, tried=0b001) == [None]
    assert choices(balancer, 1, avoid=0b001) == [0]


def beside(balancer: Balancer, server: Server, tried: int = 0) -> Server | None:
    """What is tried beside a server, which is one of those that were tried."""
    tried |= 1 << server.index
    return balancer.choose(CLIENT, tried | balancer.others_than(server), 0)


def test_a_rival_is_of_the_same_tier(bench: Bench) -> None:
    servers = [upstream(1), upstream(2), upstream(3, is_backup=True), upstream(4, is_backup=True)]
    balancer = bench.balancer(*servers, group=Group(balance=Balance.LEAST))
    first, second, third, fourth = balancer.servers
    assert beside(balancer, first, 0b0001) is second
    assert beside(balancer, first, 0b0011) is None
    assert beside(balancer, third) is fourth
    bench.find(1, Standing.DOWN)
    assert beside(balancer, first) is None
    assert [bench.sessions(index) for index in range(4)] == [0, 1, 0, 1]


def test_a_session_does_not_wait_for_a_server_that_was_taken_out_meanwhile(bench: Bench) -> None:
    servers = [upstream(1), upstream(2), upstream(3, is_backup=True)]
    balancer = bench.balancer(*servers, group=Group(balance=Balance.LEAST))
    first, second, third = balancer.servers
    assert balancer.choose(CLIENT, 0b001, 0) is second
    bench.find(1, Standing.EJECTED)
    assert beside(balancer, second) is first
    bench.find(0, Standing.DOWN)
    assert beside(balancer, second) is third
    assert beside(balancer, second, 0b100) is None
    bench.find(2, Standing.DOWN)
    assert beside(balancer, second) is first  # all are used


def test_workers_begin_with_different_servers(bench: Bench) -> None:
    firsts = []
    for slot in range(4):
        surroundings = replace(bench.surroundings, part=slot / 4)
        for balance in (Balance.TURN, Balance.LEAST):
            rows = range(ROWS + 1, ROWS + 10)
            balancer = Balancer(Group(balance=balance), some(8), rows, surroundings)
            server = balancer.choose(CLIENT, 0, 0)
            assert server is not None
            balancer.let_go(server)
            firsts.append(server.index)
            assert bench.holder.settle()
    assert firsts == [0, 0, 2, 2, 4, 4, 6, 6]


# -- limits


@pytest.mark.parametrize("balance", Balance)
def test_full_servers_are_skipped(bench: Bench, balance: Balance) -> None:
    balancer = bench.balancer(*some(3, most=4), group=Group(balance=balance))
    servers = [balancer.choose(CLIENT, 0, 0) for _ in range(12)]
    assert sorted(map(str, indices(servers))) == sorted("012" * 4)
    for tried, is_full in ((0, True), (0b111, False), (0b010, True)):
        assert balancer.choose(CLIENT, tried, 0) is None
        assert balancer.is_full == is_full
    server = servers[5]
    assert server is not None
    balancer.let_go(server)
    assert balancer.choose(CLIENT, 0, 0) is server


def test_backups_are_not_for_those_that_are_full(bench: Bench) -> None:
    balancer = bench.balancer(upstream(1, most=1), upstream(2, is_backup=True))
    assert choices(balancer, 2) == [0, None]
    assert balancer.is_full
    bench.find(0, Standing.DOWN)
    assert choices(balancer, 2) == [1, 1]


def test_only_those_with_a_limit_are_full(bench: Bench) -> None:
    balancer = bench.balancer(upstream(1, most=2), upstream(2))
    assert choices(balancer, 6) == [0, 1, 0, 1, 1, 1]


def test_an_agent_says_how_many_sessions_its_server_may_have(bench: Bench) -> None:
    agents = Group(check=Check(kind=CheckKind.AGENT))
    balancer = bench.balancer(upstream(), group=agents)
    bench.table.find(1, Standing.UP, FULL, 1, limit=2)
    chosen = [balancer.choose(CLIENT, 0, 0) for _ in range(3)]
    assert [server is not None for server in chosen] == [True, True, False]
    assert balancer.is_full
    bench.table.find(1, Standing.UP, FULL, 1)
    assert balancer.choose(CLIENT, 0, 0) is not None


def test_a_slow_start_is_one_of_max_sessions_too(bench: Bench) -> None:
    balancer = bench.balancer(upstream(1, most=20))
    bench.find(0, Standing.SLOW, 150)
    assert choices(balancer, 4) == [0, 0, 0, None]
    bench.find(0, Standing.SLOW, 10)
    bench.find(0, Standing.SLOW, 250)
    assert choices(balancer, 3) == [0, 0, None]
    bench.find(0, Standing.UP)
    assert choices(balancer, 16) == [0] * 15 + [None]


@pytest.mark.parametrize("balance", Balance)
def test_limits_hold_for_all_workers_together(bench: Bench, balance: Balance) -> None:
    """As many tokens as sessions are allowed: whoever has a server finds a token of it."""
    workers, most, attempts = 6, 3, 400
    context = multiprocessing.get_context("fork")
    tokens = [context.Semaphore(most) for _ in range(3)]

    def work() -> None:
        chance = random.Random(os.getpid())
        holder = Holder(bench.gate, Holdings())

        def settle() -> None:
            holder.settle()

        surroundings = replace(
            bench.surroundings, holder=holder, settle_soon=settle, draw=chance.random
        )
        group = Group(balance=balance)
        balancer = Balancer(group, some(3, most), range(ROWS + 1, ROWS + 5), surroundings)
        mine: list[Server] = []
        for _ in range(attempts):
            try:
                server = balancer.choose(bytes((10, 0, 0, chance.randrange(9))), 0, 0)
            except Busy:
                continue
            if server is None:
                assert balancer.is_full
            else:
                assert tokens[server.index].acquire(block=False), "one too many"
                mine.append(server)
            while mine and (server is None or chance.random() < 0.5):
                gone = mine.pop()
                tokens[gone.index].release()
                balancer.let_go(gone)

    processes = [context.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        process.close()


# -- the lock is stuck


@pytest.fixture
def stuck(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Another process has the lock, and has had it for long, until this is undone."""

    def lock() -> None:
        raise Busy

    monkeypatch.setattr(bench.gate, "lock", lock)
    monkeypatch.setattr(type(bench.gate), "stuck_s", GUESSES_AFTER_S)
    return monkeypatch


def test_without_the_lock_the_unlimited_are_chosen_and_counted_later(
    bench: Bench, stuck: pytest.MonkeyPatch
) -> None:
    upstreams = [upstream(1, most=5), upstream(2), upstream(3)]
    balancer = bench.balancer(*upstreams, group=Group(balance=Balance.LEAST))
    assert choices(balancer, 4) == [1, 2, 1, 2]
    assert bench.settlings == 4
    assert bench.gate.sessions(ROWS + 2) == 0
    assert not bench.holder.settle()
    stuck.undo()
    assert [bench.sessions(index) for index in range(3)] == [0, 2, 2]


def test_for_a_moment_nothing_is_chosen_without_the_lock(
    bench: Bench, stuck: pytest.MonkeyPatch
) -> None:
    """By counts that stand still all would go to one server."""
    balancer = bench.balancer(*some(3), group=Group(balance=Balance.LEAST))
    stuck.setattr(type(bench.gate), "stuck_s", GUESSES_AFTER_S / 2)
    with pytest.raises(Busy):
        balancer.choose(CLIENT, 0, 0)
    assert choices(bench.balancer(*some(3), group=Group(balance=Balance.TURN)), 3) == [0, 1, 2]


@pytest.mark.usefixtures("stuck")
def test_without_the_lock_no_limit_is_passed(bench: Bench) -> None:
    balancer = bench.balancer(*some(2, most=5))
    with pytest.raises(Busy):
        balancer.choose(CLIENT, 0, 0)
    balancer.let_go(balancer.servers[0])  # does not wait for it


# -- the first check


def test_sessions_wait_for_the_first_check_but_not_for_ever(bench: Bench) -> None:
    check = Check(kind=CheckKind.TCP, timeout_s=2.0, starts_down=True)
    for index in range(2):
        bench.find(index, Standing.UNKNOWN)
    balancer = bench.balancer(*some(2), group=Group(check=check))
    assert choices(balancer, 1) == [None]
    assert (balancer.is_unknown, balancer.is_full) == (True, False)
    bench.now += 1.5
    bench.find(0, Standing.DOWN)
    assert choices(balancer, 1) == [None]
    bench.now += 0.5
    assert choices(balancer, 4) == [0, 1, 0, 1]
    bench.find(1, Standing.UP)
    assert choices(balancer, 2) == [1, 1]
    bench.find(1, Standing.DOWN)
    assert choices(balancer, 2) == [0, 1]


def test_a_server_that_is_known_does_not_wait_for_others(bench: Bench) -> None:
    bench.find(0, Standing.UNKNOWN)
    balancer = bench.balancer(*some(2), group=Group(check=Check(kind=CheckKind.TCP)))
    assert choices(balancer, 2) == [1, 1]


def test_who_has_tried_all_others_waits_for_the_first_check(bench: Bench) -> None:
    bench.find(0, Standing.UNKNOWN)
    bench.find(1, Standing.DOWN)
    balancer = bench.balancer(*some(3), group=Group(check=Check(kind=CheckKind.TCP)))
    assert choices(balancer, 2, tried=0b100) == [1, 1]
    assert choices(balancer, 1, tried=0b110) == [None]
    assert balancer.is_unknown
    bench.now += 10
    assert choices(balancer, 1, tried=0b110) == [0]


def test_nobody_waits_for_a_server_that_is_out(bench: Bench) -> None:
    bench.find(0, Standing.UNKNOWN)
    bench.order(0, DRAIN)
    balancer = bench.balancer(*some(1), group=Group(check=Check(kind=CheckKind.TCP)))
    assert choices(balancer, 1) == [None]
    assert not balancer.is_unknown


def test_after_the_first_check_is_overdue_nobody_is_let_in_who_should_not(bench: Bench) -> None:
    bench.find(0, Standing.UNKNOWN)
    group = Group(check=Check(kind=CheckKind.TCP, timeout_s=1.0), fails_open=False)
    balancer = bench.balancer(*some(1), group=group)
    assert choices(balancer, 1) == [None]
    assert balancer.is_unknown
    bench.now += 1.0
    assert choices(balancer, 1) == [None]
    assert not balancer.is_unknown


# -- sessions that have to go

RESETS = Group(on_down=OnDown.RESET)


def test_who_is_found_down_loses_its_sessions_once(bench: Bench) -> None:
    balancer = bench.balancer(*some(3), group=RESETS)
    bench.find(1, Standing.EJECTED)  # no check has said so
    assert balancer.expelled() == []
    bench.find(1, Standing.DOWN)
    assert indices(balancer.expelled()) == [1]
    assert balancer.expelled() == []
    bench.find(1, Standing.UP)
    bench.find(1, Standing.DOWN)  # and again, before anybody has looked
    assert indices(balancer.expelled()) == [1]


def test_sessions_that_begin_while_all_are_down_may_stay(bench: Bench) -> None:
    for index in range(2):
        bench.find(index, Standing.DOWN)
    balancer = bench.balancer(*some(2), group=RESETS)
    assert choices(balancer, 2) == [0, 1]
    assert balancer.expelled() == []
    bench.order(0, 0)
    balancer = bench.balancer(*some(3), group=RESETS, former=balancer)
    assert balancer.expelled() == []


def test_sessions_from_before_a_reload_are_cut_after_it(bench: Bench) -> None:
    former = bench.balancer(*some(2), group=RESETS)
    bench.find(0, Standing.DOWN)
    balancer = bench.balancer(*some(2), group=RESETS, former=former)
    assert indices(balancer.expelled()) == [0]


def test_a_reload_that_wants_sessions_cut_cuts_them(bench: Bench) -> None:
    former = bench.balancer(*some(2))
    bench.find(0, Standing.DOWN)
    assert former.expelled() == []
    balancer = bench.balancer(*some(2), group=RESETS, former=former)
    assert indices(balancer.expelled()) == [0]
    assert balancer.expelled() == []


def test_an_order_cuts_whatever_the_group_says(bench: Bench) -> None:
    balancer = bench.balancer(*some(2))
    bench.order(1, DISABLE | CUTS)
    assert indices(balancer.expelled()) == [1]
    bench.order(1, DISABLE)
    assert balancer.expelled() == []


def test_sessions_of_backups_are_cut_bit_by_bit(bench: Bench) -> None:
    upstreams = [upstream(1), upstream(2, is_backup=True)]
    balancer = bench.balancer(*upstreams, group=Group(on_up=OnUp.RETURN))
    assert balancer.returning(bench.now) == 0.0
    bench.find(0, Standing.DOWN)
    assert balancer.returning(bench.now) == 0.0
    bench.find(0, Standing.UP)
    left, found = 1000.0, []
    for _ in range(int(RETURN_S) + 3):
        left -= left * balancer.returning(bench.now)
        found.append(left)
        bench.now += 1.0
    assert found == pytest.approx([1000 - 100 * beat for beat in range(11)] + [0, 0])


def test_a_primary_that_goes_again_stops_the_return(bench: Bench) -> None:
    upstreams = [upstream(1), upstream(2, is_backup=True)]
    group = Group(on_up=OnUp.RETURN)
    balancer = bench.balancer(*upstreams, group=group)
    bench.find(0, Standing.DOWN)
    balancer.returning(bench.now)
    bench.find(0, Standing.UP)
    balancer.returning(bench.now)
    bench.now += 1
    assert balancer.returning(bench.now) == pytest.approx(0.1)
    balancer = bench.balancer(*upstreams, group=group, former=balancer)
    bench.now += 1
    assert balancer.returning(bench.now) == pytest.approx(1 / 9)
    bench.find(0, Standing.DOWN)
    bench.now += 1
    assert balancer.returning(bench.now) == 0.0


def test_sessions_of_backups_stay_unless_told(bench: Bench) -> None:
    balancer = bench.balancer(upstream(1), upstream(2, is_backup=True))
    bench.find(0, Standing.DOWN)
    assert choices(balancer, 1) == [1]
    bench.find(0, Standing.UP)
    assert choices(balancer, 1) == [0]
    bench.now += 1
    assert balancer.returning(bench.now) == 0.0


# -- a reload


def test_a_server_is_the_same_after_a_reload_that_leaves_it_alone(bench: Bench) -> None:
    former = bench.balancer(*some(2, most=3))
    balancer = bench.balancer(upstream(1, most=3), upstream(2, 5, most=3), former=former)
    assert balancer.servers[0] is former.servers[0]
    assert balancer.servers[1] is not former.servers[1]
    assert balancer.servers[1].counts is former.servers[1].counts
    assert balancer.take_over(former.servers[1]) is balancer.servers[1]
    assert bench.settlings == 0


def test_sessions_from_before_a_limit_count(bench: Bench) -> None:
    former = bench.balancer(*some(2))
    old = [former.choose(CLIENT, 0, 0) for _ in range(4)]
    balancer = bench.balancer(*some(2, most=3), former=former)
    now = [balancer.take_over(server) for server in old if server is not None]
    assert indices(now) == [0, 1, 0, 1]
    assert [bench.sessions(index) for index in range(2)] == [2, 2]
    assert choices(balancer, 3) == [0, 1, None]
    without = bench.balancer(*some(2), former=balancer)
    for server in now:
        without.let_go(without.take_over(server))
    assert [bench.sessions(index) for index in range(2)] == [1, 1]


def test_sessions_go_with_their_rule_to_a_group_of_another_name(bench: Bench) -> None:
    least, turn = Group(balance=Balance.LEAST), Group()
    for before, after in ((least, least), (least, turn), (turn, least)):
        former = bench.balancer(*some(2), group=before)
        old = [former.choose(CLIENT, 0, 0) for _ in range(4)]
        rows = range(ROWS + 11, ROWS + 14)
        balancer = Balancer(after, some(2), rows, bench.surroundings, former)
        now = [balancer.take_over(server) for server in old if server is not None]
        assert indices(now) == [0, 1, 0, 1]
        assert sum(map(bench.sessions, range(2))) == 0
        assert sum(map(bench.sessions, (10, 11))) == (4 if after is least else 0)
        for server in now:
            balancer.let_go(server)
        assert sum(map(bench.sessions, (10, 11))) == 0


def test_a_session_of_a_server_that_has_left_the_group_ends_as_it_began(bench: Bench) -> None:
    former = bench.balancer(*some(2), group=Group(balance=Balance.LEAST))
    assert choices(former, 2) == [0, 1]
    balancer = bench.balancer(upstream(1), former=former)
    gone = former.servers[1]
    assert balancer.take_over(gone) is gone
    balancer.let_go(gone)
    assert bench.sessions(1) == 0


def test_each_server_has_its_row(bench: Bench) -> None:
    balancer = bench.balancer(*some(2))
    balancer.servers[1].counts[SESSIONS] += 1
    assert bench.rows[ROWS + 2][SESSIONS] == 1
    assert balancer.row == ROWS + 3
    assert [server.name for server in balancer.servers] == ["10.0.0.1:80", "10.0.0.2:80"]


# -- clients


@pytest.mark.parametrize(
    ("address", "key"),
    [
        (("192.0.2.7", 1), ip_address("192.0.2.7").packed),
        (("2001:db8::7", 1, 0, 0), ip_address("2001:db8::7").packed),
        (("fe80::1%lo", 1, 0, 1), ip_address("fe80::1").packed),
        (("::ffff:192.0.2.7", 1, 0, 0), ip_address("::ffff:192.0.2.7").packed),
        ("", b""),
        ("/run/a.sock", b""),
        ("\0name", b""),
    ],
)
def test_the_key_of_a_client(address: tuple[str, int] | str, key: bytes) -> None:
    assert packed_host(address) == key
