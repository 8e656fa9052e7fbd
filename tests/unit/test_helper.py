"""A helper of the master: started, watched, replaced; here by a real process that does little."""

from __future__ import annotations

import errno
import os
import select
import selectors
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.waiting import PATIENCE_S, eventually

from forwarder.supervision import helper
from forwarder.supervision.helper import Helper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.ipc.channel import Channel, Message, Received


class Echo:
    """A job: say what was said, or die, or talk nonsense, or do nothing at all."""

    def __init__(self) -> None:
        self.started = 0
        self.heard: list[Message] = []

    def run(self, channel: Channel, beat: Callable[[float], None]) -> None:
        while True:
            beat(time.monotonic())
            select.select([channel], [], [])
            for received in channel.receive():
                if received.message["op"] == "die":
                    os._exit(3)
                if received.message["op"] == "sleep":
                    signal.pause()
                channel.send(received.message)

    def on_started(self) -> None:
        self.started += 1

    def on_message(self, received: Received) -> None:
        if received.message["op"] == "nonsense":
            raise ValueError
        self.heard.append(received.message)


class Master:
    """What a master does for its helper."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.job = Echo()
        self.helper = Helper("test", self.job, self.selector, lambda: None)
        self.now = time.monotonic()

    def turn(self) -> None:
        self.helper.turn(self.now)
        for key, _ in self.selector.select(0):
            key.data()
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            self.helper.on_exit(pid, status)

    def turn_until(self, is_true: Callable[[], bool]) -> None:
        def turn() -> bool:
            self.turn()
            return is_true()

        eventually(turn)

    def said(self, message: Message) -> bool:
        return message in self.job.heard


@pytest.fixture
def master() -> Iterator[Master]:
    it = Master()
    yield it
    it.helper.end()
    it.selector.close()


def test_it_is_there_while_it_is_wanted(master: Master) -> None:
    master.turn()
    assert master.job.started == 0
    assert master.helper.describe(master.now) == []
    master.helper.want(is_wanted=True)
    master.turn()
    assert master.job.started == 1
    (pid,) = procfs.children(os.getpid())
    master.helper.send({"op": "hello"})
    master.turn_until(lambda: master.said({"op": "hello"}))
    (told,) = master.helper.describe(master.now)
    assert (told["state"], told["pid"]) == ("running", pid)
    assert procfs.title(pid) == "forwarder: test"
    master.helper.want(is_wanted=False)
    master.turn_until(lambda: not procfs.children(os.getpid()))
    master.helper.send({"op": "to nobody"})
    assert master.helper.deadline is None


def test_it_is_replaced_at_once_and_then_less_and_less_often(master: Master) -> None:
    master.helper.want(is_wanted=True)
    waits = []
    for number in range(1, 6):
        master.turn()
        assert master.job.started == number
        master.helper.send({"op": "die"})
        master.turn_until(lambda: not procfs.children(os.getpid()))
        assert master.helper.deadline is not None
        waits.append(master.helper.deadline - time.monotonic())
        master.now = master.helper.deadline
    assert waits[0] <= 0
    assert waits == sorted(waits)
    assert 0.5 < waits[4] <= 0.8


@pytest.mark.parametrize("op", ["nonsense", "sleep"])
def test_one_that_talks_nonsense_or_hangs_is_killed_and_replaced(master: Master, op: str) -> None:
    master.helper.want(is_wanted=True)
    master.turn()
    (first,) = procfs.children(os.getpid())
    master.helper.send({"op": op})
    if op == "sleep":
        for _ in range(4):  # a master that is not stopped itself looks often
            master.now += master.helper.hang_s / 3
            master.turn()
    master.turn_until(lambda: first not in procfs.children(os.getpid()))
    master.now = time.monotonic() + master.helper.hang_s
    master.turn_until(lambda: master.job.started == 2)


def test_a_master_that_was_stopped_itself_does_not_take_it_for_hung(master: Master) -> None:
    master.helper.want(is_wanted=True)
    master.turn()
    (pid,) = procfs.children(os.getpid())
    master.now += 1000
    master.turn()
    assert procfs.children(os.getpid()) == [pid]
    master.helper.send({"op": "hello"})
    master.turn_until(lambda: master.said({"op": "hello"}))


def test_where_none_can_be_forked_it_is_tried_again(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = procfs.descriptors(os.getpid())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fork)
        master.helper.want(is_wanted=True)
        for _ in range(3):
            master.turn()
            assert master.helper.deadline is not None
            master.now = max(master.now, master.helper.deadline)
    assert master.job.started == 0
    assert procfs.descriptors(os.getpid()) == before
    (told,) = master.helper.describe(master.now)
    assert told["state"] == "waiting"
    master.turn()
    assert master.job.started == 1


def test_where_one_cannot_be_watched_another_one_follows(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result: what is sent meanwhile harms nobody, and the next one is told everything."""

    def register(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(master.selector, "register", register)
        master.helper.want(is_wanted=True)
        master.turn()
        master.helper.send({"op": "hello"})
    assert master.job.started == 0
    master.turn_until(lambda: not procfs.children(os.getpid()))
    master.now = time.monotonic()
    master.turn()
    assert master.job.started == 1
    master.helper.send({"op": "hello"})
    master.turn_until(lambda: master.said({"op": "hello"}))


def test_a_stopped_one_is_ended_all_the_same(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "_REAP_S", PATIENCE_S)
    master.helper.want(is_wanted=True)
    master.turn()
    (pid,) = procfs.children(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    master.helper.end()
    assert procfs.children(os.getpid()) == []
