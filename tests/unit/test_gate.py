"""The gate between real processes: exact at every moment, whoever is killed or stopped."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.processes import state
from support.waiting import eventually

from forwarder.limits.gate import PATIENCE_S, STUCK_S, Busy, Gate, Holder, Holdings
from forwarder.limits.tables import CountTable, table_words
from forwarder.stats.board import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LIMIT = 7
ROW = 3
KEYS = (11, 11 + (1 << 20), 11 + (1 << 30))  # all at one place of the table
PROCESSES = 6


class Shared:
    """Numbers that all processes of a test see."""

    def __init__(self, count: int) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 8 * count)).cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._numbers[index] = value


class Crowd:
    """Forked processes that use one gate. All that are left are killed at the end."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.holdings: dict[int, Holdings] = {}
        self.seen = Shared(64)

    def fork(self, act: Callable[[Holder], None]) -> int:
        """A process that does ``act``; it ends with status 1 if that raises."""
        mine = Holdings()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                act(Holder(self.gate, mine))
                status = 0
            finally:
                os._exit(status)
        self.holdings[pid] = mine
        return pid

    def wait(self, pid: int) -> int:
        """Wait for the end of a process; returns its exit code, as subprocess does."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        del self.holdings[pid]
        return code

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def recount(self, rows: Sequence[int] = (ROW,)) -> None:
        """As the master does after a death; it tries again as that does."""

        def is_done() -> bool:
            try:
                self.gate.recount(self.holdings.values(), rows)
            except Busy:
                return False
            return True

        eventually(is_done)

    def assert_exact(self) -> None:
        """What is shared is what the living hold, while none of them is at work."""
        living = list(self.holdings.values())
        assert self.gate.sessions(ROW) == sum(mine.rows[ROW] for mine in living)
        assert self.gate.sessions(0) == sum(mine.rows[0] for mine in living)
        for key in KEYS:
            assert self.gate.sessions_of(key) == sum(mine.clients.get(key) for mine in living)

    def close(self) -> None:
        for pid in tuple(self.holdings):
            self.kill(pid)
        self.gate.close()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    it = Crowd()
    yield it
    it.close()


def take(holder: Holder, key: int, note: Callable[[], None]) -> bool:
    """Take a place within the limit, if the lock is to be had; ``note`` it while nobody else can.

    What is added up without the lock are numbers of different moments.
    """
    try:
        with holder as gate:
            is_taken = gate.sessions(ROW) < LIMIT and gate.hold(holder.mine, ROW, key)
            if is_taken:
                note()
            return is_taken
    except Busy:
        time.sleep(STUCK_S)  # as the product does: it comes back later
        return False


def hammer(holder: Holder, seen: Shared, cell: int, goal: int | None) -> None:
    """Take places, ``goal`` of them or for ever, and give them back.

    ``seen``: how many each has, and behind them the most that there were at once.
    """
    chance = random.Random(cell)
    mine: list[int] = []

    def note() -> None:
        seen[cell] = len(mine) + 1
        total = sum(seen[other] for other in range(PROCESSES))
        seen[PROCESSES] = max(seen[PROCESSES], total)

    while goal is None or goal > 0:
        if mine and chance.random() < 0.5:
            seen[cell] = len(mine) - 1  # before it is free for others
            holder.let_go(ROW, mine.pop())
            holder.settle()
        elif take(holder, key := chance.choice(KEYS), note):
            mine.append(key)
            goal = None if goal is None else goal - 1
    while mine:
        seen[cell] = len(mine) - 1
        holder.let_go(ROW, mine.pop())
    while not holder.settle():
        time.sleep(STUCK_S)


def test_the_limit_is_never_exceeded_and_nothing_is_left(crowd: Crowd) -> None:
    pids = [
        crowd.fork(lambda holder, cell=cell: hammer(holder, crowd.seen, cell, 1000))  # type: ignore[misc]
        for cell in range(PROCESSES)
    ]
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    crowd.assert_exact()
    assert crowd.gate.sessions(ROW) == crowd.gate.sessions(0) == 0
    assert [crowd.wait(pid) for pid in pids] == [0] * PROCESSES
    assert crowd.seen[PROCESSES] == LIMIT, "exceeded, or never reached"


def test_a_rate_is_shared_exactly(crowd: Crowd) -> None:
    """All want more than there is; time stands still, so that exactly the burst passes."""
    burst, now = 500, 1000.0

    def ask(holder: Holder, cell: int) -> None:
        for _ in range(400):
            try:
                with holder as gate:
                    if gate.may_pass(ROW, now, 10.0, burst):
                        gate.pass_row(ROW, now, 10.0)
                        crowd.seen[cell] += 1
            except Busy:
                continue

    pids = [
        crowd.fork(lambda holder, cell=cell: ask(holder, cell))  # type: ignore[misc]
        for cell in range(4)
    ]
    assert [crowd.wait(pid) for pid in pids] == [0] * 4
    assert sum(crowd.seen[cell] for cell in range(4)) == burst
    assert not crowd.gate.may_pass(ROW, now, 10.0, burst)
    crowd.gate.unpass_row(ROW, 10.0)
    assert crowd.gate.may_pass(ROW, now, 10.0, burst)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_is_killed_leaves_what_the_living_hold(crowd: Crowd, seed: int) -> None:
    """Again and again some are killed, anywhere, also inside the lock; others take their place.

    *Result*: after a recount the shared counts are those of the living, who never fail.
    """
    chance = random.Random(seed)
    for cell in range(PROCESSES):
        crowd.fork(lambda holder, cell=cell: hammer(holder, crowd.seen, cell, None))  # type: ignore[misc]
    for _ in range(15):
        victims = chance.sample(sorted(crowd.holdings), 2)
        time.sleep(chance.random() * 0.004)  # not to wait for something: anywhere in its life
        for pid in victims:
            crowd.kill(pid)
        crowd.recount()
        for cell in range(2):
            crowd.fork(lambda holder, cell=cell: hammer(holder, crowd.seen, cell, None))  # type: ignore[misc]
    stop_outside_the_lock(crowd)
    crowd.assert_exact()
    assert len(crowd.holdings) == PROCESSES, "one has failed"
    for pid in crowd.holdings:
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    for pid in tuple(crowd.holdings):
        crowd.kill(pid)
    crowd.recount()
    assert crowd.gate.sessions(ROW) == 0


def stop_outside_the_lock(crowd: Crowd) -> None:
    """Stop all at a moment when none of them has the lock, by having it ourselves."""
    while True:
        try:
            with crowd.gate:
                for pid in crowd.holdings:
                    os.kill(pid, signal.SIGSTOP)
                    eventually(lambda pid=pid: state(pid) == "T")  # type: ignore[misc]
                return
        except Busy:
            continue


def stop_with_lock(crowd: Crowd) -> int:
    """A process that has stopped itself while it has the lock."""

    def act(holder: Holder) -> None:
        with holder:
            os.kill(os.getpid(), signal.SIGSTOP)

    pid = crowd.fork(act)
    eventually(lambda: state(pid) == "T")
    return pid


def test_nobody_hangs_on_a_stopped_holder_of_the_lock(crowd: Crowd) -> None:
    """*Result*: a decision is Busy; what ends or begins meanwhile is owed, and then counted."""
    holder = Holder(crowd.gate, Holdings())
    with holder as gate:
        assert gate.hold(holder.mine, ROW, KEYS[0])
        assert gate.hold(holder.mine, ROW, KEYS[1])
    pid = stop_with_lock(crowd)
    cpu = time.process_time()
    with pytest.raises(Busy), holder:
        pass
    assert crowd.gate.is_stuck
    holder.let_go(ROW, KEYS[0])
    assert not holder.settle()
    holder.hold(ROW, 0)
    for _ in range(1000):
        assert not holder.settle()
    # Once a lock is stuck it is tried, not waited for: a thousand times PATIENCE_S are 5 s.
    assert time.process_time() - cpu < 1000 * PATIENCE_S / 2
    assert crowd.gate.sessions(ROW) == 2
    crowd.kill(pid)  # as the master does after hang_timeout
    assert holder.settle()
    assert crowd.gate.sessions(ROW) == holder.mine.rows[ROW] == 2
    assert [crowd.gate.sessions_of(key) for key in KEYS] == [0, 1, 0]


def test_bandwidth_goes_on_beside_a_stopped_holder_of_the_lock(crowd: Crowd) -> None:
    pid = stop_with_lock(crowd)
    assert crowd.gate.draw(1, 1000.0, 0.25) == 0
    assert crowd.gate.draw(1, 1000.1, 0.25) == pytest.approx(0.15, abs=0.01)
    crowd.kill(pid)


def test_a_lock_that_was_stuck_is_waited_for_again_later(crowd: Crowd) -> None:
    pid = stop_with_lock(crowd)
    assert not crowd.gate.stuck_s
    with pytest.raises(Busy):
        crowd.gate.lock()
    eventually(lambda: crowd.gate.stuck_s > STUCK_S)
    with pytest.raises(Busy):
        crowd.gate.lock()
    assert crowd.gate.stuck_s > STUCK_S  # since the first time
    crowd.kill(pid)
    eventually(lambda: not crowd.gate.is_stuck)
    crowd.gate.lock()
    crowd.gate.unlock()
    assert not crowd.gate.stuck_s


def test_more_is_owed_than_one_turn_works_off(crowd: Crowd) -> None:
    holder = Holder(crowd.gate, Holdings())
    for _ in range(1000):
        holder.hold(ROW, KEYS[2])
    assert holder.settle()
    assert crowd.gate.sessions(ROW) == crowd.gate.sessions_of(KEYS[2]) == 1000
    for _ in range(1000):
        holder.let_go(ROW, KEYS[2])
    assert holder.settle()
    assert crowd.gate.sessions(ROW) == crowd.gate.sessions_of(KEYS[2]) == 0


def test_with_more_clients_than_there_is_room_for_the_rules_stay_exact(crowd: Crowd) -> None:
    """Clients for whom there is no room are refused, or if they were there before, not counted."""
    crowd.gate._clients = CountTable(memoryview(bytearray(8 * table_words(4))).cast("Q"))
    mine = Holdings()
    held = [crowd.gate.hold(mine, ROW, key) for key in range(1, 9)]
    assert held == [True] * 4 + [False] * 4
    assert crowd.gate.sessions(ROW) == 4
    for key in range(5, 9):
        crowd.gate.hold_anyway(mine, ROW, key)
    assert crowd.gate.sessions(ROW) == 8
    for key in range(1, 9):
        crowd.gate.let_go(mine, ROW, key)
    assert crowd.gate.sessions(ROW) == crowd.gate.sessions(0) == mine.rows[ROW] == 0


def test_a_row_of_another_rule_has_nothing_of_the_former_one(crowd: Crowd) -> None:
    gate, now = crowd.gate, 1000.0
    gate.pass_row(ROW, now, 1 / 3600)
    assert not gate.may_pass(ROW, now, 1 / 3600, 1)
    assert gate.draw(2 * ROW, now, 3600) == 0
    gate.forget(ROW)
    assert gate.may_pass(ROW, now, 1 / 3600, 1)
    assert gate.draw(2 * ROW, now, 1) == 0


def test_a_reservation_that_is_given_back_beside_a_stuck_lock_costs_nothing(crowd: Crowd) -> None:
    holder = Holder(crowd.gate, Holdings())
    with holder as gate:
        gate.hold(holder.mine, ROW, 0)
        gate.pass_row(ROW, 1000.0, 1 / 3600)
    pid = stop_with_lock(crowd)
    holder.let_go(ROW, 0, 1 / 3600)
    assert not holder.settle()
    crowd.kill(pid)
    assert holder.settle()
    assert crowd.gate.sessions(ROW) == 0
    assert crowd.gate.may_pass(ROW, 1000.0, 1 / 3600, 1)


def test_after_a_stuck_lock_there_is_time_for_what_others_owe(crowd: Crowd) -> None:
    gate = crowd.gate
    pid = stop_with_lock(crowd)
    with pytest.raises(Busy):
        gate.lock()
    assert (gate.is_stuck, gate.is_settled) == (True, False)
    crowd.kill(pid)
    gate.lock()
    gate.unlock()
    assert (gate.is_stuck, gate.is_settled) == (False, False)
    eventually(lambda: gate.is_settled)


# -- servers, whose sessions are counted beside those of their rules

SERVERS = tuple(ROWS + seat for seat in (1, 2, 65535))
MOST = 4  # sessions of each


def take_one(holder: Holder, server: int, note: Callable[[], None]) -> bool:
    """Take a place at a server that has room, as :func:`take`."""
    try:
        with holder as gate:
            if gate.sessions(server) >= MOST:
                return False
            gate.take_server(holder.mine, server)
            note()
            return True
    except Busy:
        time.sleep(STUCK_S)
        return False


def crowd_servers(holder: Holder, seen: Shared, cell: int, goal: int | None) -> None:
    """Take places at servers, ``goal`` of them or for ever, and give them back.

    ``seen``: what each has of each server, and behind that the most that there were at once.
    """
    chance = random.Random(cell)
    mine: list[int] = []

    def note(index: int) -> None:
        at, most = index * PROCESSES, len(SERVERS) * PROCESSES + index
        seen[at + cell] = mine.count(index) + 1
        total = sum(seen[at + other] for other in range(PROCESSES))
        seen[most] = max(seen[most], total)

    def leave() -> None:
        index = mine.pop()
        # Before it is free for others. Not one less: who takes the place of one that was killed
        # may share its cell with another one, and below 0 it would fail.
        seen[index * PROCESSES + cell] = mine.count(index)
        holder.leave_server(SERVERS[index])

    while goal is None or goal > 0:
        index = chance.randrange(len(SERVERS))
        if mine and chance.random() < 0.5:
            leave()
            holder.settle()
        elif take_one(holder, SERVERS[index], partial(note, index)):
            mine.append(index)
            goal = None if goal is None else goal - 1
    while mine:
        leave()
    while not holder.settle():
        time.sleep(STUCK_S)


def test_no_server_ever_has_more_than_it_may(crowd: Crowd) -> None:
    pids = [
        crowd.fork(lambda holder, cell=cell: crowd_servers(holder, crowd.seen, cell, 1000))  # type: ignore[misc]
        for cell in range(PROCESSES)
    ]
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for server in SERVERS:
        assert crowd.gate.sessions(server) == 0
        assert all(mine.rows[server] == 0 for mine in crowd.holdings.values())
    assert [crowd.wait(pid) for pid in pids] == [0] * PROCESSES
    most = [crowd.seen[len(SERVERS) * PROCESSES + index] for index in range(len(SERVERS))]
    assert most == [MOST] * len(SERVERS), "exceeded, or never reached"


def test_a_server_counts_beside_its_rule_and_not_for_all_rules(crowd: Crowd) -> None:
    gate, mine = crowd.gate, Holdings()
    gate.hold(mine, ROW, 0)
    gate.take_server(mine, SERVERS[0])
    gate.take_server(mine, SERVERS[0])
    assert [gate.sessions(row) for row in (0, ROW, SERVERS[0], SERVERS[1])] == [1, 1, 2, 0]
    gate.change_servers(mine, {SERVERS[0]: -1}, {})
    gate.let_go(mine, ROW, 0)
    assert [gate.sessions(row) for row in (0, ROW, SERVERS[0])] == [0, 0, 1]
    gate.change_servers(mine, {SERVERS[0]: -2}, {})  # once too often is no debt of others
    assert gate.sessions(SERVERS[0]) == mine.rows[SERVERS[0]] == 0


def test_a_session_of_a_server_that_moves_is_counted_once_in_any_order(crowd: Crowd) -> None:
    """It may begin, move and end before the lock is free once."""
    gate, row = crowd.gate, SERVERS[0]
    giver, taker = Holder(gate, Holdings()), Holder(gate, Holdings())
    giver.take_server(row)
    giver.pass_server_on(row)
    taker.take_server_on(row)
    assert giver.settle()
    assert (gate.sessions(row), giver.mine.rows[row]) == (1, 0)
    assert taker.settle()
    assert (gate.sessions(row), taker.mine.rows[row]) == (1, 1)
    taker.pass_server_on(row)
    giver.take_server_on(row)
    giver.leave_server(row)
    assert giver.settle()
    assert taker.settle()
    assert (gate.sessions(row), giver.mine.rows[row], taker.mine.rows[row]) == (0, 0, 0)


def test_whoever_is_killed_gives_its_servers_back(crowd: Crowd) -> None:
    """*Result*: the shared counts are those of the living, and servers are not full for ever."""
    chance = random.Random(7)
    for cell in range(PROCESSES):
        crowd.fork(lambda holder, cell=cell: crowd_servers(holder, crowd.seen, cell, None))  # type: ignore[misc]
    for _ in range(10):
        victims = chance.sample(sorted(crowd.holdings), 2)
        time.sleep(chance.random() * 0.004)  # not to wait for something: anywhere in its life
        for pid in victims:
            crowd.kill(pid)
        crowd.recount(SERVERS)
        for cell in range(2):
            crowd.fork(lambda holder, cell=cell: crowd_servers(holder, crowd.seen, cell, None))  # type: ignore[misc]
    stop_outside_the_lock(crowd)
    for server in SERVERS:
        living = sum(mine.rows[server] for mine in crowd.holdings.values())
        assert crowd.gate.sessions(server) == living <= MOST
    for pid in tuple(crowd.holdings):
        crowd.kill(pid)
    crowd.recount(SERVERS)
    assert [crowd.gate.sessions(server) for server in SERVERS] == [0, 0, 0]


def test_sessions_of_servers_are_owed_beside_a_stuck_lock(crowd: Crowd) -> None:
    holder = Holder(crowd.gate, Holdings())
    with holder as gate:
        gate.take_server(holder.mine, SERVERS[0])
    pid = stop_with_lock(crowd)
    holder.leave_server(SERVERS[0])
    holder.take_server(SERVERS[1])
    holder.hold(ROW, 0)
    assert not holder.settle()
    assert [crowd.gate.sessions(server) for server in SERVERS[:2]] == [1, 0]
    crowd.kill(pid)
    assert holder.settle()
    assert [crowd.gate.sessions(row) for row in (*SERVERS[:2], ROW, 0)] == [0, 1, 1, 1]
    assert [holder.mine.rows[row] for row in (*SERVERS[:2], ROW, 0)] == [0, 1, 1, 1]
