"""Seats of servers: who gets one, who keeps it, and what goes to a successor."""

from __future__ import annotations

import json
import os
import selectors
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from forwarder.balancing.table import (
    DRAINS,
    FULL,
    HAS_ORDER,
    LAYOUT,
    ORDER,
    SEATS,
    SHARED,
    STATE,
    TABLE_BYTES,
    ServerTable,
    Standing,
)
from forwarder.config.address import Address
from forwarder.config.model import Config, Group, Rule, Settings, Upstream
from forwarder.errors import Place
from forwarder.ipc.channel import channel_pair, to_memory_file
from forwarder.ipc.messages import Op, read_assignment
from forwarder.limits.gate import Holdings
from forwarder.serving.generation import Serving
from forwarder.serving.listeners import ListenerTable
from forwarder.stats.board import ROWS
from forwarder.stats.ledger import Ledger
from forwarder.stats.rows import SESSIONS
from forwarder.succession import upgrade
from forwarder.succession.line import READY_VARIABLE
from forwarder.supervision.fleet import Fleet
from forwarder.supervision.servers import Servers
from forwarder.supervision.slot import WorkerProcess, WorkerTables
from forwarder.system import memfile

if TYPE_CHECKING:
    from collections.abc import Iterator


def address(port: int) -> Address:
    return Address("10.0.0.1", port, port)


def rule(*ports: int, name: str = "web", group: str = "") -> Rule:
    """A rule with one upstream for each port."""
    return Rule(
        name=name,
        listen=address(80),
        upstreams=tuple(Upstream(end=address(port)) for port in ports),
        group=Group(name=group),
        place=Place("test"),
    )


def server(port: int, group: str = "web") -> tuple[str, str]:
    return group, str(address(port))


class Site:
    """The servers of a master without workers."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.servers = Servers(self.ledger)
        self.held: set[int] = set()  # rows in which something is held at the gate

    def serve(self, *rules: Rule) -> list[tuple[int, ...]]:
        """A reload: tell workers of these rules, then forget; returns the rows that they get."""
        rows = [self.servers.rows(one, one.group_name) for one in rules]
        in_force = [(one, one.group_name) for one in rules]
        self.gone = self.servers.forget(in_force, lambda row: row not in self.held)
        return rows

    def seat(self, port: int) -> int:
        seat = self.servers.seat(*server(port))
        assert seat is not None
        return seat

    def close(self) -> None:
        self.servers.close()
        self.ledger.end()


@pytest.fixture
def site() -> Iterator[Site]:
    it = Site()
    yield it
    it.close()


@pytest.fixture
def heir() -> Iterator[Site]:
    it = Site()
    yield it
    it.close()


# -- giving and forgetting


def test_each_server_of_a_group_has_a_row_and_the_group_has_the_last(site: Site) -> None:
    (rows,) = site.serve(rule(1, 2, 3))
    assert rows == tuple(range(ROWS + 1, ROWS + 5))
    assert [site.seat(port) for port in (1, 2, 3)] == [1, 2, 3]
    assert site.servers.seat("web", "") == 4


def test_rules_that_share_a_group_share_its_servers(site: Site) -> None:
    shared = [rule(1, 2, name="a", group="pg"), rule(1, 2, name="b", group="pg")]
    first, second = site.serve(*shared)
    assert first == second
    (own,) = site.serve(rule(1, 2, name="c"))
    assert not set(own) & set(first)


def test_a_rule_with_nothing_to_choose_has_no_rows(site: Site) -> None:
    assert site.serve(rule(1)) == [()]
    assert site.ledger.servers() == []
    bounded = replace(rule(1), upstreams=(Upstream(end=address(1), max_sessions=5),))
    assert len(site.serve(bounded)[0]) == 2


def test_a_server_keeps_its_seat_while_it_stays_in_force(site: Site) -> None:
    before = site.serve(rule(1, 2))[0]
    after = site.serve(rule(3, 2, 1))[0]
    assert after[1:3] == (before[1], before[0])
    assert after[3] == before[2]


def test_a_server_is_forgotten_when_it_has_been_gone_for_a_whole_reload(site: Site) -> None:
    """Until then a worker may not have heard that it is gone."""
    site.serve(rule(1, 2))
    seat = site.seat(2)
    site.servers.table.order(seat, HAS_ORDER | DRAINS)
    site.serve(rule(1, 3))
    assert site.gone == []
    assert site.servers.table.word(seat, ORDER) == HAS_ORDER | DRAINS
    site.serve(rule(1, 3))
    assert site.gone == [server(2)]
    assert site.servers.table.word(seat, ORDER) == 0
    assert site.servers.seat(*server(2)) is None
    site.serve(rule(1, 3, 4))
    assert site.seat(4) == seat


def test_a_server_that_comes_back_meanwhile_has_what_was_said_of_it(site: Site) -> None:
    site.serve(rule(1, 2))
    site.servers.table.order(site.seat(2), HAS_ORDER | DRAINS)
    seat = site.seat(2)
    for rules in (rule(1, 3), rule(1, 2), rule(1, 3), rule(1, 2)):
        site.serve(rules)
    assert site.seat(2) == seat
    assert site.servers.table.word(seat, ORDER) == HAS_ORDER | DRAINS


def test_a_server_with_sessions_keeps_its_seat_until_they_have_ended(site: Site) -> None:
    (rows,) = site.serve(rule(1, 2))
    board = site.ledger.open()
    board.row(rows[1])[SESSIONS] = 1
    for _ in range(3):
        site.serve(rule(1, 3))
        assert site.gone == []
    board.row(rows[1])[SESSIONS] = 0
    site.serve(rule(1, 3))
    assert site.gone == [server(2)]


def test_a_group_in_which_a_client_waits_keeps_its_seat(site: Site) -> None:
    """Who waits has no session yet: only the gate counts it."""
    (rows,) = site.serve(rule(1, 2))
    site.held = {rows[-1]}
    site.serve()
    site.serve()
    assert set(site.gone) == {server(1), server(2)}
    site.held = set()
    site.serve()
    assert site.gone == [("web", "")]


def test_a_server_of_which_the_checker_may_still_write_keeps_its_seat(site: Site) -> None:
    site.serve(rule(1, 2))
    site.servers.watched = {server(2)}
    for _ in range(3):
        site.serve(rule(1, 3))
        assert site.gone == []
    site.servers.watched = set()
    site.serve(rule(1, 3))
    assert site.gone == [server(2)]


def test_a_seat_that_is_given_says_nothing_whatever_a_failed_successor_has_left(
    site: Site,
) -> None:
    table = site.servers.table
    for seat in range(1, 10):
        table.find(seat, Standing.DOWN, 0, 1)
        table.order(seat, HAS_ORDER | DRAINS)
    before = table.revision
    site.serve(rule(1, 2))
    for port in (1, 2):
        assert table.standing(site.seat(port)) is Standing.UP
        assert table.weight(site.seat(port), 3) == 3 * FULL
    assert table.revision != before


def test_servers_beyond_the_last_seat_share_one_in_which_nothing_is_said(site: Site) -> None:
    for number in range(1, SEATS - 1):
        site.ledger.server_row("many", str(number))
    (rows,) = site.serve(rule(1, 2))
    assert rows == (ROWS + SHARED,) * 3
    assert site.servers.seat(*server(1)) is None
    site.servers.table.order(SHARED, HAS_ORDER | DRAINS)
    site.servers.table.find(SHARED, Standing.DOWN, 0, 1)
    assert site.servers.table.weight(SHARED, 2) == 2 * FULL


# -- what workers get


def test_an_assignment_has_the_rows_of_servers_by_rule() -> None:
    """Also for a rule that is closing: its sessions are those of the rule whose name it had."""
    closing = rule(1, 2, name="web at 10.0.0.1:80, closing")
    rules = (rule(9, name="plain"), rule(1, 2), closing, rule(1, 2, name="db", group="pg"))
    serving = Serving(
        revision=1,
        generation=1,
        config=Config(rules=rules, settings=Settings(workers=1)),
        binds={one.name: () for one in rules},
        counted_as={closing.name: "web"},
    )
    ours, theirs = channel_pair()
    with selectors.DefaultSelector() as selector:
        fleet = Fleet(ListenerTable(), selector)
        fleet.serving = serving
        tables = WorkerTables(fleet.ledger.open(), Holdings(), fleet.keeper.open())
        process = WorkerProcess(0, os.getpid(), tables, ours, time.monotonic())
        selector.register(ours, selectors.EVENT_READ, process)
        fleet.telling.serve(process, serving, 1, (0,))
        (received,) = (one for one in theirs.receive() if one.message["op"] == Op.APPLY)
        assignment = read_assignment(received)
        fleet.close()
        ours.close()
        theirs.close()
    plain, web, closed, db = assignment.seats
    assert plain == ()
    assert web == closed
    assert len(set(web) | set(db)) == 6
    assert min(web + db) > ROWS > max(assignment.rows)


# -- a successor


def handed(site: Site) -> tuple[int, bytes]:
    """What a successor of a master gets."""
    return os.dup(site.servers.table.fileno()), site.servers.as_text()


def test_a_successor_has_the_seats_of_its_predecessor_and_what_was_said(
    site: Site, heir: Site
) -> None:
    site.serve(rule(1, 2, 3), rule(1, 2, name="db", group="pg"))
    site.servers.table.order(site.seat(2), HAS_ORDER | DRAINS)
    site.servers.table.find(site.seat(3), Standing.DOWN, 0, 5)
    heir.servers.inherit(handed(site))
    (rows,) = heir.serve(rule(4, 3, 2, 1))
    assert [heir.seat(port) for port in (1, 2, 3)] == [site.seat(port) for port in (1, 2, 3)]
    assert heir.seat(4) not in dict(site.ledger.servers()).values()
    assert heir.servers.table.word(heir.seat(2), ORDER) == HAS_ORDER | DRAINS
    assert heir.servers.table.standing(heir.seat(3)) is Standing.DOWN
    # Workers of both read the same memory.
    heir.servers.table.find(heir.seat(1), Standing.EJECTED, 0, 6)
    assert site.servers.table.standing(site.seat(1)) is Standing.EJECTED
    assert len(rows) == 5


def test_a_successor_gives_no_seat_of_its_predecessor_to_another_server(
    site: Site, heir: Site
) -> None:
    site.serve(rule(1, 2))
    heir.servers.inherit(handed(site))
    heir.serve(rule(7, 8, name="other"))
    taken = {row for _, row in site.ledger.servers()}
    new = {row for (group, _), row in heir.ledger.servers() if group == "other"}
    assert len(new) == 3
    assert not new & taken


def test_a_successor_of_older_code_begins_with_a_table_in_which_nothing_is_said(
    heir: Site,
) -> None:
    table = heir.servers.table
    heir.servers.inherit(None)
    assert heir.servers.table is table


GOOD = ["web", "10.0.0.1:1", 1]
NONSENSE = {
    "nothing": b"",
    "no json": b"{",
    "too deep": b"[" * 100_000,
    "no table": b"[]",
    "a number": b"7",
    "no text": b"\xff\xfe",
    "no seats": json.dumps({"layout": LAYOUT}).encode(),
    "no list": json.dumps({"layout": LAYOUT, "seats": 5}).encode(),
    "another layout": json.dumps({"layout": LAYOUT + 1, "seats": [GOOD]}).encode(),
    **{
        f"seats {bad}": json.dumps({"layout": LAYOUT, "seats": bad}).encode()
        for bad in (
            [GOOD, ["web"]],
            [GOOD, [*GOOD, 1]],
            [GOOD, ["web", "b", 0]],
            [GOOD, ["web", "b", -1]],
            [GOOD, ["web", "b", SEATS]],
            [GOOD, ["web", "b", 1e300]],
            [GOOD, ["web", "b", 10**400]],
            [GOOD, ["web", "b", True]],
            [GOOD, ["web", "b", "2"]],
            [GOOD, ["web", 5, 2]],
            [GOOD, [None, "b", 2]],
            [GOOD, [["web"], "b", 2]],
            [GOOD, ["web", "b", 1]],
            [GOOD, ["web", "10.0.0.1:1", 2]],
        )
    },
}


@pytest.mark.parametrize("text", NONSENSE.values(), ids=[name[:30] for name in NONSENSE])
def test_seats_that_make_no_sense_are_refused_as_a_whole(
    site: Site, heir: Site, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    """*Result*: a table as at a start; the predecessor's is neither used nor written to."""
    site.servers.table.find(1, Standing.DOWN, 0, 5)
    table = heir.servers.table
    heir.servers.inherit((os.dup(site.servers.table.fileno()), text))
    assert "servers: cannot read the seats of the predecessor" in caplog.text
    assert heir.servers.table is table
    assert heir.ledger.servers() == []
    heir.serve(rule(1, 2))
    assert heir.servers.table.standing(heir.seat(1)) is Standing.UP
    assert site.servers.table.standing(1) is Standing.DOWN


def test_states_that_only_newer_code_knows_do_no_harm(site: Site) -> None:
    table = site.servers.table
    table.words[8 + STATE] = 2**64 - 1
    assert table.standing(1) is Standing.UP


class Given:
    """What a predecessor of any kind has left in the environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._fds: list[int] = []
        monkeypatch.setenv(READY_VARIABLE, "2")

    def add(self, fd: int, *, is_inherited: bool = True) -> int:
        os.set_inheritable(fd, is_inherited)
        self._fds.append(fd)
        return fd

    def found(self, text: str) -> tuple[int, bytes] | None:
        self._monkeypatch.setenv("FORWARDER_SERVERS_FDS", text)
        found = upgrade.servers_of_predecessor()
        assert "FORWARDER_SERVERS_FDS" not in os.environ
        return found

    def is_open(self, fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def close(self) -> None:
        for fd in self._fds:
            if self.is_open(fd):
                os.close(fd)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    it = Given(monkeypatch)
    yield it
    it.close()


def test_what_the_predecessor_gives_is_taken_once(given: Given) -> None:
    table, seats = given.add(memfile.make("t", TABLE_BYTES)), given.add(to_memory_file(b"text"))
    assert given.found(f"{table},{seats}") == (table, b"text")
    assert not os.get_inheritable(table)
    assert not given.is_open(seats)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "3", "1-9", "99999,99998", "1," * 50_000, "4294967299,4"]
)
def test_numbers_that_are_no_files_of_a_predecessor_give_nothing(given: Given, text: str) -> None:
    assert given.found(text) is None


def test_a_stale_variable_touches_no_file_that_has_its_number_now(given: Given) -> None:
    """Older code passes it on to the next one, whose descriptors are others."""
    ours, theirs = (
        given.add(memfile.make("t", TABLE_BYTES), is_inherited=False),
        given.add(to_memory_file(b"names")),
    )
    assert given.found(f"{ours},{theirs}") is None
    short = given.add(memfile.make("t", TABLE_BYTES // 2))
    assert given.found(f"{short},{theirs}") is None
    could_shrink = given.add(os.memfd_create("t", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(could_shrink, TABLE_BYTES)
    assert given.found(f"{could_shrink},{theirs}") is None
    assert all(map(given.is_open, (ours, theirs, short, could_shrink)))


def test_seats_that_are_no_file_in_memory_are_not_read(given: Given) -> None:
    """A pipe would block for ever."""
    table = given.add(memfile.make("t", TABLE_BYTES))
    read_end, write_end = os.pipe()
    given.add(read_end)
    given.add(write_end)
    assert given.found(f"{table},{read_end}") == (table, b"")


def test_a_file_that_is_no_table_is_refused_and_closed() -> None:
    fd = memfile.make("t", 4096)
    with pytest.raises(ValueError, match="not a table"):
        ServerTable(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_what_two_masters_say_at_once_is_a_change_for_their_workers(site: Site, heir: Site) -> None:
    """Each has read the table before the other has written; a count would be the same for both."""
    heir.servers.inherit(handed(site))
    seen = {site.servers.table.revision}
    for table in (site.servers.table, heir.servers.table):
        table.order(1, HAS_ORDER)
        seen.add(table.revision)
        table.find(1, Standing.DOWN, 0, 1)
        seen.add(table.revision)
        table.clear(1)
        seen.add(table.revision)
    assert len(seen) == 7
