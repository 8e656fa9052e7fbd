"""Names are looked up by the checker, here as a thread of the test with a master of its own."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.waiting import PATIENCE_S, eventually

from forwarder.balancing.table import ServerTable
from forwarder.checker.process import CheckerProcess
from forwarder.ipc.channel import Channel, channel_pair
from forwarder.net.sockets import Target
from forwarder.upstream import asking, schedule
from forwarder.upstream.answers import Answer
from forwarder.upstream.asking import FORGET, HURRY, WANT
from forwarder.upstream.messages import read_answers, read_hosts, say_answers, say_hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = Target(socket.AF_INET, ("192.0.2.1", 0))


class Master:
    """Says which names are wanted, and hears of them. Look-ups of ``held`` do not end."""

    def __init__(self) -> None:
        self.channel, self._theirs = channel_pair()
        self.asked: list[str] = []
        self.found: dict[str, Answer] = {}
        self.beats = 0
        self.held: dict[str, threading.Event] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        table = ServerTable()
        CheckerProcess(self._theirs, self._beat, table, self._look).run()
        table.close()
        self._theirs.close()

    def _beat(self, now: float) -> None:
        assert now <= time.monotonic()
        self.beats += 1

    def _look(self, host: str) -> Answer:
        self.asked.append(host)
        if host in self.held:
            self.held[host].wait(PATIENCE_S)
        if host.startswith("bug"):
            raise ZeroDivisionError
        return Answer((), "no such name") if host.startswith("no") else Answer((ADDRESS,))

    def say(self, op: str, *hosts: str) -> None:
        for message in say_hosts(op, hosts):
            self.channel.send(message)

    def hear(self) -> dict[str, Answer]:
        """All that was found so far."""
        self.channel.flush()
        for received in self.channel.receive():
            self.found |= read_answers(received.message)
        return self.found

    def wait_found(self, *hosts: str) -> None:
        eventually(lambda: set(hosts) <= self.hear().keys(), lambda: str(self.found.keys()))

    def end(self) -> None:
        """Go; the process ends with us, whatever is under way."""
        self.channel.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        for event in self.held.values():
            event.set()


@pytest.fixture
def master() -> Iterator[Master]:
    it = Master()
    yield it
    it.end()


def test_a_name_is_found_while_others_are_not_answered(master: Master) -> None:
    dead = [f"dead{i}" for i in range(3 * schedule.MAX_OF_A_KIND)]
    master.held |= {host: threading.Event() for host in dead}
    master.say(WANT, *dead, "a-live", "no-such", "zlive")
    master.wait_found("a-live")
    assert master.found["a-live"].addresses == (ADDRESS,)
    master.wait_found("no-such", "zlive")
    assert master.found["no-such"].why == "no such name"
    assert not set(dead) & master.found.keys()


def test_a_look_up_that_takes_too_long_has_failed_until_it_ends(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "LIMIT_S", 0.1)
    master.held["late"] = threading.Event()
    master.say(WANT, "late")
    master.wait_found("late")
    assert "no answer within" in master.found["late"].why
    master.held["late"].set()
    eventually(lambda: master.hear()["late"].addresses == (ADDRESS,))


def test_a_bug_in_a_look_up_costs_that_one(master: Master) -> None:
    master.say(WANT, "bug", "live")
    master.wait_found("bug", "live")
    assert "internal error: ZeroDivisionError" in master.found["bug"].why


def test_what_nobody_wants_any_more_is_not_told(master: Master) -> None:
    master.held["gone"] = threading.Event()
    master.say(WANT, "gone")
    eventually(lambda: master.asked == ["gone"])
    master.say(FORGET, "gone")
    master.say(WANT, "other")
    master.wait_found("other")
    master.held["gone"].set()
    master.say(WANT, "third")
    master.wait_found("third")
    assert "gone" not in master.found


def test_a_name_is_looked_up_again_soon_if_somebody_asks(master: Master) -> None:
    master.say(WANT, "live")
    master.wait_found("live")
    master.say(HURRY, "live", "unknown")
    eventually(lambda: master.asked == ["live", "live"])


def test_no_thread_to_be_had_is_waited_for(
    master: Master, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asking, "NO_THREAD_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        master.say(WANT, "live", "other")
        eventually(lambda: "cannot start thread" in caplog.text)
    master.wait_found("live", "other")


def test_much_is_said_in_pieces_that_fit() -> None:
    hosts = [f"{i}.{'x' * 240}" for i in range(1000)]
    answers = {host: Answer((ADDRESS,) * 64, "y" * 100, since=i) for i, host in enumerate(hosts)}
    ours, theirs = channel_pair()
    try:
        heard: list[str] = []
        for message in say_hosts(WANT, hosts):
            ours.send(message)
        _pump(ours, theirs, lambda message: heard.extend(read_hosts(message)))
        assert sorted(heard) == sorted(hosts)
        found: dict[str, Answer] = {}
        for message in say_answers("found", answers):
            ours.send(message)
        _pump(ours, theirs, lambda message: found.update(read_answers(message)))
        assert found == answers
    finally:
        ours.close()
        theirs.close()


def _pump(ours: Channel, theirs: Channel, take: object) -> None:
    """Pass on all that waits."""
    assert callable(take)
    while received := theirs.receive():
        for one in received:
            take(one.message)
        ours.flush()
