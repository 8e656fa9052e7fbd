"""What a worker says, also one that has been taken over: nothing of it may hurt the master."""

from __future__ import annotations

import array
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import procfs
from support.waiting import PATIENCE_S, eventually

from forwarder.config.model import LogFormat, LogPlace
from forwarder.errors import Place
from forwarder.ipc.channel import MAX_AT_ONCE, Channel, Received, channel_kind, to_memory_file
from forwarder.ipc.messages import (
    MAX_ANSWER_BYTES,
    MAX_SHORT_BYTES,
    Op,
    read_answer,
    send_answer,
    send_logs,
)
from forwarder.limits.gate import Holdings
from forwarder.serving.listeners import ListenerTable
from forwarder.supervision.fleet import Fleet
from forwarder.supervision.sessions import Sessions
from forwarder.supervision.slot import WorkerProcess, WorkerTables

if TYPE_CHECKING:
    from collections.abc import Iterator


class Worker:
    """A process that the fleet takes for a worker, whose end of the channel is the test's."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, channel_kind())
        self.sock.settimeout(PATIENCE_S)
        self.child = subprocess.Popen(["sleep", "1000"])
        self.selector = selectors.DefaultSelector()
        self.fleet = Fleet(ListenerTable(), self.selector)
        now = time.monotonic()
        tables = WorkerTables(self.fleet.ledger.open(), Holdings(), self.fleet.keeper.open())
        self.process = WorkerProcess(0, self.child.pid, tables, Channel(ours), now)
        self.selector.register(self.process.channel, selectors.EVENT_READ, self.process)
        self.fleet._retiring.append(self.process)
        self.heard: list[tuple[list[object], list[int]]] = []

    def ask(self) -> int:
        """Have the fleet ask for something; returns the number of the question."""
        callback = lambda found, silent: self.heard.append((found, silent))  # noqa: E731
        Sessions(self.fleet, lambda: None).ask(Op.LIST, {}, callback)
        number = json.loads(self.sock.recv(1000))["number"]
        assert isinstance(number, int)
        return number

    def say(self, content: bytes, *fds: int) -> None:
        """Send anything, with descriptors that are closed here."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([content], rights)
        for fd in fds:
            os.close(fd)

    def is_killed(self) -> bool:
        """Whether the fleet has killed it, once it has heard everything. It ends in any case."""
        self.fleet.hear(self.process)
        self.child.terminate()  # too late for one that is killed
        return self.child.wait() == -signal.SIGKILL

    def close(self) -> None:
        """End all of it."""
        self.child.kill()
        self.child.wait()
        self.sock.close()
        self.fleet.close()
        self.process.channel.close()
        self.selector.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def answer(number: int, **more: object) -> bytes:
    return json.dumps({"op": Op.ANSWER, "number": number, **more}).encode()


NONSENSE = [
    b"no json",
    b"[" * 30_000,
    b"[]",
    b"7",
    b"{}",
    b'{"op": "applied"}',
    b'{"op": "applied", "serial": 1, "missing": [[1]]}',
    b'{"op": "answer"}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", NONSENSE, ids=range(len(NONSENSE)))
def test_a_worker_that_talks_nonsense_is_killed_and_its_descriptors_are_closed(
    worker: Worker, content: bytes
) -> None:
    before = len(procfs.descriptors(os.getpid()))
    worker.say(b'{"op": "leaving-not"}', os.dup(0), os.dup(0))
    worker.say(content, os.dup(0))
    assert worker.is_killed()
    assert len(procfs.descriptors(os.getpid())) == before


def device(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def oversized() -> int:
    fd = os.memfd_create("large")
    os.truncate(fd, MAX_ANSWER_BYTES + 1)
    return fd


def nested() -> int:
    return to_memory_file(b"[" * 1_000_000)


def unwritable_pipe() -> int:
    near, far = os.pipe()
    os.close(far)
    return near


@pytest.mark.parametrize(
    "make",
    [lambda: device("/dev/zero"), lambda: device("/proc/self/mem"), oversized, nested],
    ids=["endless", "a file", "too large", "too deep"],
)
def test_a_file_that_is_no_answer_is_not_read_to_its_end(worker: Worker, make: object) -> None:
    number = worker.ask()
    worker.say(answer(number), make())  # type: ignore[operator]
    assert worker.is_killed()
    assert worker.heard == []


def test_a_pipe_in_place_of_a_file_does_not_block(worker: Worker) -> None:
    number = worker.ask()
    worker.say(answer(number), unwritable_pipe())
    assert worker.is_killed()


def test_what_nobody_has_asked_is_not_even_read(worker: Worker) -> None:
    before = len(procfs.descriptors(os.getpid()))
    for number in (0, 1, -1, 10**9):
        worker.say(answer(number, answer=[1]), device("/dev/zero"))
    assert not worker.is_killed()
    assert len(procfs.descriptors(os.getpid())) == before
    assert worker.heard == []


def test_numbers_that_make_no_sense_are_handed_on_as_they_are(worker: Worker) -> None:
    """Whoever has asked has to look at them; `test_control` does."""
    number = worker.ask()
    worker.say(answer(number, answer=[1e308, -5, {"a": "\0"}]))
    assert not worker.is_killed()
    assert worker.heard == [([[1e308, -5, {"a": "\0"}]], [])]


def test_a_worker_that_talks_without_end_is_heard_a_little_at_a_time(worker: Worker) -> None:
    worker.sock.setblocking(False)
    sent = 0
    try:
        while True:
            worker.say(b'{"op": "leaving-not"}')
            sent += 1
    except BlockingIOError:
        pass
    assert sent > MAX_AT_ONCE
    assert len(worker.process.channel.receive()) == MAX_AT_ONCE


def test_all_last_words_of_a_worker_are_heard_that_has_not_read_everything(worker: Worker) -> None:
    number = worker.ask()
    worker.process.channel.send({"op": "not read"})
    for _ in range(MAX_AT_ONCE):
        worker.say(b'{"op": "leaving-not"}')
    worker.say(answer(number, answer="a"))
    worker.sock.close()
    worker.fleet.on_exit(worker.child.pid, 9)
    assert worker.heard == [(["a"], [])]


def test_an_answer_for_which_there_was_no_descriptor_is_no_answer(worker: Worker) -> None:
    number = worker.ask()
    worker.say(answer(number, answer=None))
    assert not worker.is_killed()
    assert worker.heard == [([], [worker.child.pid])]


def test_an_answer_is_awaited_from_who_was_asked_and_once(worker: Worker) -> None:
    number = worker.ask()
    for content in ("a", "b"):
        worker.say(answer(number, answer=content))
    assert not worker.is_killed()
    assert worker.heard == [(["a"], [])]


@given(st.integers(0, 3 * MAX_SHORT_BYTES))
def test_an_answer_of_any_length_arrives(size: int) -> None:
    one, two = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, channel_kind()))
    try:
        send_answer(one, 7, "x" * size)
        (received,) = two.receive()
        assert bool(received.fds) is (size + 2 > MAX_SHORT_BYTES)
        assert read_answer(received) == "x" * size
        assert received.fds == []
    finally:
        one.close()
        two.close()


def test_a_message_closes_what_nobody_has_taken_from_it() -> None:
    before = len(procfs.descriptors(os.getpid()))
    received = Received({}, [os.dup(0), os.dup(0)])
    received.close()
    received.close()
    eventually(lambda: len(procfs.descriptors(os.getpid())) == before)


def test_logs_of_which_one_cannot_be_sent_leave_no_descriptor() -> None:
    """As when the limit of descriptors is met at the second one."""
    place = LogPlace(to="/log", format=LogFormat.JSON, place=Place("test"))
    one, two = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, channel_kind()))
    before = len(procfs.descriptors(os.getpid()))
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            send_logs(one, [(place, 0), (place, 1 << 20)])
        assert len(procfs.descriptors(os.getpid())) == before
        assert two.receive() == []
    finally:
        one.close()
        two.close()
