"""Requests and their answers, without a master; the server with a clock of its own."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import TYPE_CHECKING

import pytest

from forwarder.control.orders import Action, Wanted
from forwarder.control.path import ControlListener
from forwarder.control.protocol import MAX_ANSWER_BYTES
from forwarder.control.requests import CONDITIONS, Requests, new_size
from forwarder.control.server import (
    IDLE_S,
    MAX_CLIENTS,
    ControlServer,
    RequestError,
    parse,
)
from forwarder.ipc.messages import Op
from forwarder.ipc.questions import ANSWER_WITHIN_S, Questions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from forwarder.control.server import Message, Reply
    from forwarder.ipc.questions import Answered


class Instance:
    """What a master answers."""

    size = 2
    problem = ""

    def status(self) -> Message:
        return {"pid": 1}

    def reload(self) -> str:
        return self.problem

    def ask_sessions(self, op: Op, choice: Message, callback: Answered) -> None:
        self.choice = choice
        if op is Op.LIST:
            callback([[{"id": 1}, {"id": 2}], [{"id": 3}, "no session"], "no list"], [7])
        else:
            callback([2, 1, None, -5, 10**30], [7])

    def move_sessions(self, choice: Message, slot: int, reply: Reply) -> str:
        self.choice, self.slot = choice, slot
        if not self.problem:
            reply({"moved": 3})
        return self.problem

    def resize(self, size: int) -> str:
        self.size = size
        return self.problem

    def upgrade(self) -> str:
        return self.problem

    def describe_upstreams(self, only: str | None) -> list[Message]:
        return [{"name": only or "all"}]

    def order(self, wanted: Wanted, uid: int, reply: Reply) -> str:
        self.ordered = wanted, uid
        if not self.problem:
            reply({"ok": True})
        return self.problem

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("+1", 5), ("-1", 3), ("7", 7), ("+0", 4), ("", None), ("+", None), ("1.5", None)),
        *(("٣", None), ("--1", None), (" 1", None), ("99999", None)),
    ],
)
def test_a_number_of_workers(text: str, size: int | None) -> None:
    assert new_size(text, 4) == size


@pytest.mark.parametrize("line", [b"", b"x", b"7", b"[]", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_request(line: bytes) -> None:
    with pytest.raises(RequestError):
        parse(line)


def test_a_reload_is_answered_by_the_loading_that_began_after_it() -> None:
    requests, first, second = Requests(Instance()), list[object](), list[object]()
    requests.handle({"op": "reload"}, lambda answer: first.append(answer["ok"]), 0)
    requests.on_loading()
    requests.handle({"op": "reload"}, lambda answer: second.append(answer["ok"]), 0)
    requests.on_accepted("report", 2)
    assert (first, second) == ([], [])
    requests.on_settled()
    assert (first, second) == ([True], [])
    requests.on_loading()
    requests.on_rejected(["bad"])
    assert (first, second) == ([True], [False])


def test_a_stop_answers_everybody() -> None:
    requests, answers = Requests(Instance()), list[object]()
    for op in ("reload", "stop"):
        requests.handle({"op": op}, lambda answer: answers.append(answer["ok"]), 0)
    requests.handle(
        {"op": "workers", "count": "+1"}, lambda answer: answers.append(answer["ok"]), 0
    )
    requests.cancel()
    assert answers == [False, False]
    requests.on_stopped({})
    assert answers == [False, False, True]


class Bench:
    """A server whose time and turns are the test's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.asked: list[tuple[Message, Reply]] = []
        self.selector = selectors.DefaultSelector()
        self.listener = ControlListener(path)
        self.server = ControlServer(
            self.listener,
            self.selector,
            lambda message, reply, _: self.asked.append((message, reply)),
            lambda: self.now,
        )

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        sock.setblocking(False)
        return sock

    def turn(self) -> None:
        """Until nothing happens any more."""
        while ready := self.selector.select(0):
            for key, _ in ready:
                key.data()
        self.server.turn()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "c.sock")
    yield bench
    bench.server.close()
    bench.selector.close()
    bench.server.remove_file()
    assert not bench.path.exists()


def test_half_a_line_and_silence_is_closed(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.send(b'{"op"')
        bench.turn()
        assert bench.server.deadline == bench.now + IDLE_S
        bench.now += IDLE_S
        bench.turn()
        assert sock.recv(100) == b""
    assert bench.server.deadline is None


def test_who_waits_for_an_answer_is_not_idle(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.send(b"{}\n{}\n")
        bench.turn()
        bench.now += 10 * IDLE_S
        bench.turn()
        ((_, reply),) = bench.asked
        reply({"ok": True})
        reply({"ok": "twice"})
        assert sock.recv(100) == b'{"ok":true}\n'
        bench.turn()
        assert len(bench.asked) == 2


def test_one_request_per_turn_and_clients_in_turn(bench: Bench) -> None:
    with bench.connect() as one, bench.connect() as two:
        one.send(b'{"n":1}\n{"n":1}\n')
        two.send(b'{"n":2}\n')
        for _ in range(3):
            bench.turn()
            bench.asked[-1][1]({})
    assert [message["n"] for message, _ in bench.asked] == [1, 2, 1]


def test_a_client_that_does_not_read_its_answer_is_closed(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.send(b"{}\n")
        bench.turn()
        bench.asked[0][1]({"x": "y" * (MAX_ANSWER_BYTES - 100)})
        bench.turn()
        bench.now += IDLE_S
        bench.turn()
        assert bench.server.deadline is None
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 20):
                pass


def test_clients_that_ask_for_nothing_make_room_and_others_do_not(bench: Bench) -> None:
    with contextlib.ExitStack() as stack:
        asking = [stack.enter_context(bench.connect()) for _ in range(MAX_CLIENTS - 1)]
        silent = stack.enter_context(bench.connect())
        for sock in asking:
            sock.send(b"{}\n")
            bench.turn()
        asking.append(stack.enter_context(bench.connect()))
        asking[-1].send(b"{}\n")
        bench.turn()
        assert b"too many" in silent.recv(1000)
        late = stack.enter_context(bench.connect())
        bench.turn()
        assert b"too many" in late.recv(1000)
        for (_, reply), sock in zip(bench.asked, asking, strict=True):
            reply({"ok": True})
            assert sock.recv(100) == b'{"ok":true}\n'


def test_an_answer_that_is_too_large_becomes_an_error(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.send(b"{}\n")
        bench.turn()
        bench.asked[0][1]({"x": "y" * MAX_ANSWER_BYTES})
        assert b'"ok":false' in sock.recv(1000)


def test_an_answer_to_a_client_that_has_gone_is_dropped(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.send(b"{}\n")
        bench.turn()
    bench.asked[0][1]({"ok": True})
    bench.turn()
    assert bench.server.deadline is None


@pytest.mark.parametrize("is_done", [True, False])
def test_all_who_wait_for_an_upgrade_are_told_how_it_ended(is_done: bool) -> None:
    answers: list[Message] = []
    requests = Requests(Instance())
    for _ in range(2):
        requests.handle({"op": "upgrade"}, answers.append, 0)
    assert answers == []
    requests.on_upgraded("as it was", is_done=is_done)
    requests.cancel()
    key = "report" if is_done else "error"
    assert answers == [{"ok": is_done, key: "as it was"}] * 2


def test_an_upgrade_that_cannot_begin_is_refused_at_once() -> None:
    answers: list[Message] = []
    instance = Instance()
    instance.problem = "no"
    Requests(instance).handle({"op": "upgrade"}, answers.append, 0)
    assert answers == [{"ok": False, "error": "no"}]


def answer_to(message: Message, instance: Instance | None = None) -> Message:
    answers: list[Message] = []
    Requests(instance or Instance()).handle(message, answers.append, 1000)
    (answer,) = answers
    return answer


def test_a_listing_says_whether_there_is_more() -> None:
    instance = Instance()
    cut = answer_to({"op": "sessions", "limit": 2, "rule": "a"}, instance)
    assert cut == {"ok": True, "sessions": [{"id": 1}, {"id": 2}], "is_cut": True, "silent": [7]}
    assert instance.choice == {**dict.fromkeys(CONDITIONS), "rule": "a", "limit": 3}
    assert answer_to({"op": "sessions", "limit": 3})["is_cut"] is False


def test_killing_says_how_many_and_wants_to_know_which() -> None:
    killed = answer_to({"op": "kill", "client": "10.0.0.0/8"})
    assert killed == {"ok": True, "killed": 3, "silent": [7]}
    assert answer_to({"op": "kill"})["ok"] is False


def test_moving_wants_to_know_which_and_to_whom() -> None:
    instance = Instance()
    assert answer_to({"op": "move", "rule": "a", "slot": 1}, instance) == {"ok": True, "moved": 3}
    assert instance.slot == 1
    assert instance.choice == {**dict.fromkeys(CONDITIONS), "rule": "a"}
    assert answer_to({"op": "move", "slot": 1})["ok"] is False
    for slot in (None, -1, "1", True):
        assert answer_to({"op": "move", "rule": "a", "slot": slot})["ok"] is False
    instance.problem = "not now"
    refused = answer_to({"op": "move", "rule": "a", "slot": 1}, instance)
    assert refused == {"ok": False, "error": "not now"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": "1.2"},
        {"ids": [1]},
        {"rule": 7},
        {"client": 7},
        {"group": 7},
        {"server": ["a"]},
        {"client": "10.0.0.0/33"},
        {"limit": 0},
        {"limit": True},
        {"limit": 10_001},
        {"ids": ["1.1"] * 10_000},
        {"rule": "x" * 30_000},
        {"client": "*" * 30_000},
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(wrong: Message) -> None:
    for op in ("sessions", "kill", "move"):
        assert answer_to({"op": op, "slot": 0, **wrong})["ok"] is False


def test_a_question_is_answered_when_all_have_spoken_died_or_time_is_up() -> None:
    questions = Questions()
    heard: list[tuple[list[object], list[int]]] = []

    def note(answers: list[object], silent: list[int]) -> None:
        heard.append((answers, silent))

    first = questions.note([1, 2, 3, 4], 0.0, note)
    assert questions.is_awaited(first, 1)
    questions.on_answer(first, 1, "a")
    questions.on_answer(first, 1, "twice")
    questions.on_answer(first, 9, "a stranger")
    questions.on_answer("nonsense", 2, "b")
    questions.on_exit(2)
    questions.on_answer(first, 4, None)
    assert heard == []
    assert not questions.is_awaited(first, 1)
    questions.on_answer(first, 3, "c")
    assert heard == [(["a", "c"], [4])]
    questions.note([1], 5.0, note)
    assert questions.deadline == 5.0 + ANSWER_WITHIN_S
    questions.expire(5.0 + ANSWER_WITHIN_S)
    questions.note([], 0.0, note)
    questions.expire(0.0)
    assert heard[1:] == [([], [1]), ([], [])]
    assert questions.deadline is None


ORDER: dict[str, object] = {"op": "upstream", "what": "drain", "group": "pg", "servers": ["a", "b"]}


def test_an_order_is_passed_on_with_who_gives_it() -> None:
    instance = Instance()
    assert answer_to({**ORDER, "reset": True}, instance) == {"ok": True}
    assert instance.ordered == (
        Wanted(action=Action.DRAIN, group="pg", servers=("a", "b"), cuts=True),
        1000,
    )
    assert answer_to({**ORDER, "what": "weight", "weight": 0}, instance) == {"ok": True}
    assert instance.ordered[0].weight == 0
    instance.problem = "no such server"
    assert answer_to(ORDER, instance) == {"ok": False, "error": "no such server"}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"what": "stop"}, "what is one of drain, disable, enable, weight"),
        ({"what": ["drain"]}, "what is one of drain, disable, enable, weight"),
        ({"what": None}, "what is one of drain, disable, enable, weight"),
        ({"group": 7}, "group is the name of a group, a text"),
        ({"servers": "a"}, "servers is a list of texts, as `forwarder upstream list` shows them"),
        ({"servers": []}, "servers is a list of texts, as `forwarder upstream list` shows them"),
        ({"servers": [""]}, "servers is a list of texts, as `forwarder upstream list` shows them"),
        ({"login": 7}, "login is a name of at most 64 characters"),
        ({"login": "a\n"}, "login is a name of at most 64 characters"),
        ({"login": "a" * 65}, "login is a name of at most 64 characters"),
        ({"reset": 1}, "reset is true or false, for drain and disable"),
        ({"what": "enable", "reset": True}, "reset is true or false, for drain and disable"),
        ({"weight": 1}, "weight is a number from 0 to 256, for weight alone"),
        ({"what": "weight"}, "weight is a number from 0 to 256, for weight alone"),
        (
            {"what": "weight", "weight": 257},
            "weight is a number from 0 to 256, for weight alone",
        ),
        (
            {"what": "weight", "weight": True},
            "weight is a number from 0 to 256, for weight alone",
        ),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(wrong: Message, why: str) -> None:
    instance = Instance()
    assert answer_to({**ORDER, **wrong}, instance) == {"ok": False, "error": why}
    assert not hasattr(instance, "ordered")


def test_groups_are_described_alone() -> None:
    assert answer_to({"op": "upstreams"}) == {"ok": True, "groups": [{"name": "all"}]}
    one = answer_to({"op": "upstreams", "group": "pg"})
    assert one == {"ok": True, "groups": [{"name": "pg"}]}
