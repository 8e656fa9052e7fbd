"""The checker's servers: when they are checked, and what is written of them. Time is the test's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from forwarder.balancing.table import (
    CHECKS_FAILED,
    CHECKS_PASSED,
    DISABLED,
    DRAINS,
    EJECTIONS,
    FULL,
    HAS_ORDER,
    SINCE_NS,
    ServerTable,
    Standing,
)
from forwarder.checker.checks import Checks, Needs
from forwarder.checker.loop import Loop
from forwarder.checker.messages import Checked
from forwarder.checker.outcome import Advice, Outcome
from forwarder.checker.plan import MOST_AT_ONCE
from forwarder.checker.standing import What
from forwarder.config.address import parse_upstream
from forwarder.config.model import Check, CheckKind, Group, SocketOptions, Upstream
from forwarder.net.sockets import Target
from forwarder.upstream.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.checker.outcome import Aim

CHECK = Check(kind=CheckKind.TCP, every_s=2.0, fast_s=1.0, down_s=4.0, fall=2, rise=2, jitter=0.0)
STEP_S = 0.1


class Clock(Loop):
    """A loop without events, whose time passes when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def step(self) -> None:
        self.now = round(self.now + STEP_S, 3)
        self._run_due(self.now)


class Asked:
    """A check under way: a Probe."""

    def __init__(self, aim: Aim, done: Callable[[Outcome], None]) -> None:
        self.aim = aim
        self.done = done
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Bench:
    """A checker of two servers, whose checks end as ``bad`` and ``slow`` say, by port."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.table = ServerTable()
        self.names: dict[str, Answer] = {}
        self.bad: set[int] = set()
        self.ours: set[int] = set()  # that nothing is learned of
        self.slow: set[int] = set()  # whose checks do not end
        self.why = "refused"
        self.advice: Advice | None = None
        self.asked: list[Asked] = []
        self.checks = self.checker()

    def checker(self) -> Checks:
        """A checker that has just been born."""
        needs = Needs(
            loop=self.clock,
            table=self.table,
            answer=self.names.get,
            draw=lambda: 0.5,
            kinds=dict.fromkeys(CheckKind, self._begin),
        )
        return Checks(needs)

    def _begin(self, check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Asked:
        assert check.kind in CheckKind
        asked = Asked(aim, done)
        self.asked.append(asked)
        port = aim.target.port
        if port not in self.slow:
            outcome = Outcome(port not in self.bad, "", 0.0, is_ours=port in self.ours)
            why = "" if outcome.is_good else self.why
            outcome = outcome._replace(why=why, advice=self.advice)
            loop.call_at(loop.now, lambda: None if asked.is_cancelled else done(outcome))
        return asked

    def go(self, seconds: float) -> None:
        until = self.clock.now + seconds - STEP_S / 2
        while self.clock.now < until:
            self.checks.turn()
            self.clock.step()
        self.checks.turn()

    def ports(self) -> list[int]:
        """What was checked since the last time, in order."""
        found = [asked.aim.target.port for asked in self.asked]
        self.asked.clear()
        return found

    def state(self, seat: int) -> tuple[Standing, int]:
        return self.table.standing(seat), self.table.share(seat)

    def news(self) -> list[tuple[What, str]]:
        """What has become of servers since the last time, without mere hints."""
        found = [(news.what, news.server.rpartition(":")[2]) for news in self.checks.news]
        self.checks.news.clear()
        return [one for one in found if one[0] not in (What.FAILING, What.RECOVERING)]

    def close(self) -> None:
        self.checks.close()
        self.clock.close()
        self.table.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


def group(*ports: int, check: Check | None = CHECK, **more: object) -> Checked:
    """A group with a server for each port, in seats from 1."""
    return Checked(
        name="g",
        group=replace(Group(check=check), **more),  # type: ignore[arg-type]  # as the fields are
        servers=tuple(
            (Upstream(parse_upstream(f"127.0.0.1:{port}")), seat)
            for seat, port in enumerate(ports, 1)
        ),
        options=SocketOptions(),
        source=None,
        is_udp=False,
    )


# -- checks


def test_each_server_is_checked_once_in_each_interval(bench: Bench) -> None:
    bench.checks.use([group(8001, 8002)])
    bench.go(10.0)
    assert sorted(bench.ports()) == [8001] * 5 + [8002] * 5
    assert bench.table.word(1, CHECKS_PASSED) == 5
    assert bench.news() == []


def test_the_first_failed_check_of_all_is_enough_and_then_so_many(bench: Bench) -> None:
    bench.bad = {8001}
    bench.checks.use([group(8001, 8002)])
    bench.go(2.0)
    assert bench.state(1) == (Standing.DOWN, 0)
    assert bench.state(2) == (Standing.UP, FULL)
    assert bench.news() == [(What.DOWN, "8001")]
    bench.bad = {8002}
    bench.go(2.0)
    assert bench.state(2) == (Standing.UP, FULL)
    bench.go(1.0)  # the second one comes sooner
    assert bench.state(2) == (Standing.DOWN, 0)
    bench.go(10.0)
    assert bench.state(1) == (Standing.UP, FULL)
    assert bench.news() == [(What.DOWN, "8002"), (What.UP, "8001")]
    assert bench.table.word(1, CHECKS_FAILED) == 1


def test_workers_hear_only_of_changes(bench: Bench) -> None:
    bench.checks.use([group(8001)])
    bench.go(2.0)
    revision = bench.table.revision
    bench.go(10.0)
    assert bench.table.revision == revision


def test_a_slow_start_is_written_step_by_step(bench: Bench) -> None:
    bench.checks.use([group(8001, slow_start_s=10.0)])
    bench.go(2.0)
    bench.bad = {8001}
    bench.go(4.0)
    assert bench.state(1) == (Standing.DOWN, 0)
    bench.bad = set()
    bench.go(4.0 + 1.1)
    assert bench.table.standing(1) is Standing.SLOW
    shares = []
    while bench.table.standing(1) is Standing.SLOW:
        shares.append(bench.table.share(1))
        bench.go(0.5)
    assert shares == sorted(shares)
    assert len(set(shares)) > 15
    assert bench.state(1) == (Standing.UP, FULL)


def test_no_more_checks_than_may_be_are_under_way(bench: Bench) -> None:
    ports = range(8001, 8001 + 2 * MOST_AT_ONCE)
    bench.slow = set(ports)
    bench.checks.use([group(*ports)])
    bench.go(4.0)
    assert len(bench.asked) == MOST_AT_ONCE
    for asked in bench.asked[:10]:
        asked.done(Outcome(is_good=True, why="", took_s=0.0))
    bench.go(STEP_S)
    assert len(bench.ports()) == MOST_AT_ONCE + 10


def test_what_says_nothing_of_a_server_changes_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.bad = bench.ours = {8001}
    bench.checks.use([group(8001)])
    bench.go(20.0)
    assert bench.state(1) == (Standing.UP, FULL)
    assert len(bench.ports()) > 5
    assert "upstream.unchecked group=g server=127.0.0.1:8001: refused" in caplog.text


def test_a_check_that_never_ends_is_given_up_and_is_a_bug(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.slow = {8001}
    bench.checks.use([group(8001)])
    bench.go(2.0)
    bench.checks.beat()
    assert [asked.is_cancelled for asked in bench.asked] == [False]
    bench.clock.now += 3600
    bench.checks.beat()
    assert [asked.is_cancelled for asked in bench.asked] == [True]
    bench.go(2.0)
    assert len(bench.asked) == 2
    assert "a check does not end" in caplog.text


# -- names


def answer(*hosts: str, why: str = "") -> Answer:
    return Answer(tuple(Target(2, (host, 0)) for host in hosts), why)


def named() -> Checked:
    upstream = Upstream(parse_upstream("db.example:8001"))
    return replace(group(check=replace(CHECK, port=9000)), servers=((upstream, 1),))


def test_a_server_with_several_addresses_is_well_if_one_of_them_is(bench: Bench) -> None:
    bench.names["db.example"] = answer("127.0.0.1", "127.0.0.2")
    bench.checks.use([named()])
    bench.slow = {9000}
    bench.go(2.0)
    bench.asked.pop().done(Outcome(is_good=False, why="refused", took_s=0.0))
    second = bench.asked.pop()
    assert second.aim.target.sockaddr == ("127.0.0.2", 9000)
    assert bench.table.word(1, CHECKS_FAILED) == 0
    second.done(Outcome(is_good=True, why="", took_s=0.0))
    bench.go(2.0)
    assert bench.asked[-1].aim == second.aim  # it is first now


def test_a_name_that_nobody_has_looked_up_says_nothing_and_one_without_address_does(
    bench: Bench,
) -> None:
    bench.checks.use([named()])
    bench.go(5.0)
    assert bench.state(1) == (Standing.UP, FULL)
    bench.names["db.example"] = answer(why="no such name")
    bench.go(2.0)
    assert bench.state(1) == (Standing.DOWN, 0)
    assert bench.checks.news[-1].why == "db.example: no such name"
    bench.names["db.example"] = answer("127.0.0.1")
    bench.go(10.0)
    assert bench.state(1) == (Standing.UP, FULL)


# -- reloads, and other checkers


def test_what_is_as_before_keeps_its_time_and_its_state(bench: Bench) -> None:
    bench.bad = {8001}
    bench.checks.use([group(8001, 8002)])
    bench.go(3.0)
    bench.ports()
    since = bench.table.word(1, SINCE_NS)
    for _ in range(10):
        bench.checks.use([group(8001, 8002)])
        bench.go(STEP_S)
    assert len(bench.ports()) <= 1
    assert bench.state(1) == (Standing.DOWN, 0)
    assert bench.table.word(1, SINCE_NS) == since


def test_a_check_goes_on_while_the_rest_of_its_group_changes(bench: Bench) -> None:
    bench.slow = {8001}
    bench.checks.use([group(8001, 8002)])
    bench.go(2.0)
    bench.checks.use([group(8001)])
    (asked,) = (one for one in bench.asked if one.aim.target.port == 8001)
    asked.done(Outcome(is_good=True, why="", took_s=0.0))
    assert not asked.is_cancelled
    assert bench.table.word(1, CHECKS_PASSED) == 1
    bench.slow = set()
    bench.go(4.0)
    assert bench.table.word(1, CHECKS_PASSED) == 3


def test_another_check_keeps_the_state_and_is_made_at_once(bench: Bench) -> None:
    bench.bad = {8001}
    bench.checks.use([group(8001)])
    bench.go(2.0)
    bench.ports()
    bench.checks.use([group(8001, check=replace(CHECK, port=9001))])
    assert bench.state(1) == (Standing.DOWN, 0)
    bench.go(STEP_S)
    assert bench.ports() == [9001]


def test_a_check_under_way_of_a_server_that_goes_is_cancelled(bench: Bench) -> None:
    bench.slow = {8001}
    bench.checks.use([group(8001)])
    bench.go(2.0)
    bench.checks.use([])
    assert bench.asked[0].is_cancelled
    revision = bench.table.revision
    bench.go(10.0)
    assert len(bench.asked) == 1
    assert bench.table.revision == revision


def test_another_checker_goes_on_with_what_it_finds(bench: Bench) -> None:
    bench.bad = {8001}
    bench.checks.use([group(8001, 8002)])
    bench.go(4.0)
    found, since = bench.state(1), bench.table.word(1, SINCE_NS)
    bench.news()
    bench.ports()
    bench.checks = bench.checker()
    bench.checks.use([group(8001, 8002)])
    assert bench.state(1) == found
    assert bench.table.word(1, SINCE_NS) == since  # or sessions would be cut again
    bench.go(2.0)
    assert sorted(bench.ports()) == [8001, 8002]  # both, spread over one interval
    assert bench.news() == [(What.REASON, "8001")]  # which is nowhere in the table


def test_what_an_agent_has_said_outlives_the_checker(bench: Bench) -> None:
    """Until its next answer, which may say that all is as configured."""
    agent = group(8001, 8002, check=replace(CHECK, kind=CheckKind.AGENT))
    bench.advice = Advice(percent=50, max_sessions=7)
    bench.checks.use([agent])
    bench.go(4.0)
    bench.checks = bench.checker()
    bench.checks.use([agent])
    assert bench.state(1) == (Standing.UP, 500)
    assert bench.table.limit(1, 100) == 7
    bench.advice = Advice(percent=100, max_sessions=0)
    bench.go(4.0)
    assert bench.state(1) == (Standing.UP, FULL)
    assert bench.table.limit(1, 100) == 100


def test_an_agent_may_ask_for_more_than_is_configured(bench: Bench) -> None:
    bench.advice = Advice(weight=3)
    bench.checks.use([group(8001, check=replace(CHECK, kind=CheckKind.AGENT))])
    bench.go(4.0)
    assert bench.table.weight(1, 1) == 3 * FULL


def test_another_reason_is_news_but_no_change(bench: Bench) -> None:
    bench.bad = {8001}
    bench.checks.use([group(8001)])
    bench.go(4.0)
    assert bench.news() == [(What.DOWN, "8001")]
    bench.why = "http 503"
    revision = bench.table.revision
    bench.go(20.0)
    assert bench.news() == [(What.REASON, "8001")]
    assert bench.table.revision == revision


def test_a_seat_that_was_cleared_begins_anew(bench: Bench) -> None:
    bench.checks.use([group(8001, check=replace(CHECK, starts_down=True))])
    assert bench.state(1) == (Standing.UNKNOWN, 0)
    bench.checks.use([])
    bench.table.clear(1)
    bench.checks.use([group(8002)])
    assert bench.state(1) == (Standing.UP, FULL)


# -- orders


def test_a_disabled_server_is_not_checked(bench: Bench) -> None:
    bench.checks.use([group(8001, 8002)])
    bench.go(2.0)
    bench.table.order(1, HAS_ORDER | DISABLED)
    bench.go(STEP_S)
    bench.ports()
    bench.go(10.0)
    assert set(bench.ports()) == {8002}
    bench.table.order(1, 0)
    bench.go(STEP_S)
    assert 8001 in bench.ports()


def test_a_drained_server_is_checked_all_the_same(bench: Bench) -> None:
    bench.checks.use([group(8001)])
    bench.table.order(1, HAS_ORDER | DRAINS)
    bench.go(10.0)
    assert len(bench.ports()) == 5


# -- failed connects


def fail(bench: Bench, seat: int, failed: int = 3) -> None:
    server = next(it for it in bench.checks.watched() if it.seat == seat)
    bench.checks.on_connects(server, failed, 0, is_first=True)


def test_failed_connects_eject_a_server_for_a_while(bench: Bench) -> None:
    bench.checks.use([group(8001, 8002, check=None)])
    fail(bench, 1)
    assert bench.state(1) == (Standing.EJECTED, 0)
    assert bench.table.word(1, EJECTIONS) == 1
    bench.go(9.0)
    assert bench.news() == [(What.EJECTED, "8001")]
    bench.go(1.1)
    assert bench.state(1) == (Standing.UP, FULL)
    assert bench.news() == [(What.RETURNED, "8001")]


def test_the_last_server_is_not_ejected_and_not_one_that_only_a_drained_one_could_replace(
    bench: Bench,
) -> None:
    bench.checks.use([group(8001, 8002, check=None)])
    bench.table.order(2, HAS_ORDER | DRAINS)
    fail(bench, 1)
    assert bench.state(1) == (Standing.UP, FULL)
    bench.table.order(2, 0)
    fail(bench, 1)
    fail(bench, 2)
    assert bench.state(1) == (Standing.EJECTED, 0)
    assert bench.state(2) == (Standing.UP, FULL)


def test_failed_connects_lead_to_a_check_at_once_which_brings_back(bench: Bench) -> None:
    bench.checks.use([group(8001, 8002, check=replace(CHECK, every_s=3600.0))])
    bench.go(3600.0)
    bench.ports()
    fail(bench, 1)
    assert bench.state(1) == (Standing.EJECTED, 0)
    bench.go(2 * STEP_S)
    assert bench.ports() == [8001]
    assert bench.state(1) == (Standing.UP, FULL)


def test_an_ejected_server_returns_when_the_others_are_gone(bench: Bench) -> None:
    bench.checks.use([group(8001, 8002)])
    bench.go(2.0)
    bench.slow = {8001}
    fail(bench, 1)
    bench.bad = {8002}
    bench.go(4.0)
    assert bench.state(2) == (Standing.DOWN, 0)
    assert bench.state(1) == (Standing.UP, FULL)
    assert [what for what, _ in bench.news()] == [What.EJECTED, What.DOWN, What.RETURNED]


def test_an_ejected_server_returns_when_the_others_are_drained(bench: Bench) -> None:
    bench.checks.use([group(8001, 8002, check=None)])
    fail(bench, 1)
    bench.table.order(2, HAS_ORDER | DRAINS)
    bench.go(STEP_S)
    assert bench.state(1) == (Standing.UP, FULL)
