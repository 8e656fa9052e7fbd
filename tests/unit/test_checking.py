"""What the master tells its checker, and when."""

from __future__ import annotations

import os
import selectors
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from forwarder.checker.messages import BOARD, CHECKS, GONE, KNOWN, NEWS, Checked, read_checks
from forwarder.config.address import parse_upstream
from forwarder.config.model import Check, CheckKind, Config, Group, Rule, Upstream
from forwarder.errors import Place
from forwarder.ipc.channel import Received
from forwarder.serving.generation import Serving
from forwarder.stats.board import Board
from forwarder.stats.ledger import Ledger
from forwarder.supervision import checking as module
from forwarder.supervision.checking import Checking
from forwarder.supervision.servers import Servers
from forwarder.upstream.known import KnownNames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forwarder.ipc.channel import Message
    from forwarder.supervision.fleet import Fleet
    from forwarder.supervision.helper import Helper


@dataclass
class Checker:
    """A helper whose messages the test reads."""

    is_started: bool = True
    is_free: bool = True
    is_wanted: bool = False
    hang_s: float = 0.0
    deadline: float | None = None
    said: list[tuple[object, object]] = field(default_factory=list)

    def want(self, *, is_wanted: bool) -> None:
        self.is_wanted = is_wanted

    def turn(self, now: float) -> None:
        del now

    def end(self) -> None:
        self.is_started = False

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        received = Received(message, list(fds))
        if message["op"] == CHECKS:
            self.said.append((CHECKS, read_checks(received)))
        else:
            self.said.append((message["op"], message.get("pid")))
        received.close()

    def take(self) -> list[tuple[object, object]]:
        """What was said since the last time."""
        said, self.said = self.said, []
        return said

    def groups(self) -> dict[str, list[str]]:
        """The servers by group of the one CHECKS that was said since the last time."""
        (groups,) = (what for op, what in self.take() if op == CHECKS)
        assert isinstance(groups, tuple)
        return {one.name: [str(up) for up, _ in one.servers] for one in groups}


class Bench:
    """The master's side of a checker, with workers that the test makes up."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.servers = Servers(self.ledger)
        self.boards: dict[int, Board] = {}
        self.may_check = True
        fleet = SimpleNamespace(
            servers=self.servers,
            ledger=self.ledger,
            names=KnownNames(),
            processes=lambda: [
                SimpleNamespace(pid=pid, tables=SimpleNamespace(board=board))
                for pid, board in self.boards.items()
            ],
        )
        self.selector = selectors.DefaultSelector()
        self.checking = Checking(
            cast("Fleet", fleet),
            self.selector,
            lambda: None,
            lambda _: None,
            lambda: self.may_check,
        )
        self.checker = Checker()
        self.checking.helper = cast("Helper", self.checker)

    def serve(self, *rules: Rule) -> None:
        serving = Serving(
            revision=1, generation=1, config=Config(rules=rules), binds={}, counted_as={}
        )
        self.checking.use(serving, 0.0)

    def hear(self, message: Message) -> None:
        self.checking.on_message(Received(message, []))

    def deadline(self) -> float | None:
        return self.checking.deadline

    def watched(self) -> set[str]:
        return {server for _, server in self.servers.watched}

    def close(self) -> None:
        self.checking.close()
        self.selector.close()
        self.servers.close()
        for board in self.boards.values():
            board.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


CHECK = Check(kind=CheckKind.TCP)


def rule(name: str, *upstreams: str, group: str = "", check: Check | None = CHECK) -> Rule:
    return Rule(
        name=name,
        listen=parse_upstream("127.0.0.1:80"),
        upstreams=tuple(Upstream(parse_upstream(one)) for one in upstreams),
        group=Group(name=group, check=check),
        place=Place("test"),
    )


A, B = "10.0.0.1:80", "10.0.0.2:80"


def test_a_group_is_told_once_however_many_rules_lead_to_it(bench: Bench) -> None:
    one, two = rule("one", A, B, group="g"), rule("two", A, B, group="g")
    bench.serve(one, two, rule("own", A), rule("plain", A, check=None))
    assert bench.checker.is_wanted
    assert bench.checker.groups() == {"g": [A, B], "own": [A]}
    bench.serve(two, one, rule("own", A), rule("plain", B, check=None))
    bench.checking.turn(1.0)
    assert bench.checker.take() == []


def test_nothing_to_choose_needs_no_checker(bench: Bench) -> None:
    bench.serve(rule("plain", A, check=None))
    assert not bench.checker.is_wanted
    assert bench.checker.take() == []


def test_boards_come_and_go_with_their_workers(bench: Bench) -> None:
    bench.boards = {7: Board(), 8: Board()}
    bench.serve(rule("one", A, B))
    assert sorted(bench.checker.take(), key=str)[:2] == [(BOARD, 7), (BOARD, 8)]
    bench.boards.pop(7).close()
    bench.boards[9] = Board()
    bench.checking.turn(1.0)
    assert bench.checker.take() == [(GONE, 7), (BOARD, 9)]
    bench.checking.turn(2.0)
    assert bench.checker.take() == []


def test_a_new_checker_is_told_everything(bench: Bench) -> None:
    bench.boards = {7: Board()}
    bench.serve(rule("one", A, B))
    before = bench.checker.take()
    bench.checking.on_started()
    assert bench.checker.take() == before


def test_a_seat_is_kept_until_the_checker_knows_its_server_no_more(bench: Bench) -> None:
    bench.serve(rule("one", A, B))
    bench.hear({"op": KNOWN, "serial": 1})
    assert bench.watched() == {A, B}
    bench.serve(rule("one", A))
    assert bench.watched() == {A, B}
    bench.hear({"op": KNOWN, "serial": 2})
    assert bench.watched() == {A}
    bench.serve(rule("one", B))
    bench.checker.end()  # a dead one writes of nobody
    bench.checking.turn(1.0)
    assert bench.watched() == set()


def test_two_masters_do_not_check_the_same_servers(bench: Bench) -> None:
    bench.may_check = False
    bench.serve(rule("one", A, B))
    assert bench.checker.is_wanted
    assert bench.checker.take() == []
    bench.may_check = True
    assert bench.deadline() == 0.0  # at once
    bench.checking.turn(1.0)
    assert bench.checker.groups() == {"one": [A, B]}
    assert bench.deadline() is None
    bench.may_check = False
    bench.checking.turn(2.0)
    assert bench.checker.groups() == {}


def test_without_descriptors_it_is_told_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_file(groups: tuple[Checked, ...]) -> int:
        raise OSError(24, os.strerror(24), groups)

    with monkeypatch.context() as patch:
        patch.setattr(module, "checks_file", no_file)
        bench.serve(rule("one", A, B))
        assert "checker.untold: Too many open files" in caplog.text
        assert bench.checker.take() == []
        retry_at = bench.deadline()
        assert retry_at
    monkeypatch.setattr(time, "monotonic", lambda: retry_at)
    bench.checking.turn(1.0)
    assert bench.checker.groups() == {"one": [A, B]}


def test_a_changed_option_of_a_rule_is_told(bench: Bench) -> None:
    one = rule("one", A, B)
    bench.serve(one)
    bench.checker.take()
    bench.serve(replace(one, options=replace(one.options, mark=5)))
    assert bench.checker.groups() == {"one": [A, B]}


def test_other_messages_are_nonsense(bench: Bench) -> None:
    for message in ({"op": "what"}, {"op": NEWS}, {"op": KNOWN, "serial": "x"}, {}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            bench.hear(cast("Message", message))
