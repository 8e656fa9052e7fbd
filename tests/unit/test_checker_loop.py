"""The events and timers of the checker."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from support.waiting import PATIENCE_S, eventually

from forwarder.checker import loop as loops
from forwarder.checker.loop import Loop, Timer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def loop() -> Iterator[Loop]:
    it = Loop()
    yield it
    it.close()


def test_timers_are_called_in_order_and_cancelled_ones_not(loop: Loop) -> None:
    called: list[str] = []
    loop.call_at(loop.now, lambda: called.append("first"))
    late = loop.call_at(loop.now + 1e-6, lambda: called.append("cancelled"))
    loop.call_at(loop.now + 0.001, lambda: called.append("last"))
    late.cancel()
    late.cancel()
    while "last" not in called:
        loop.turn(PATIENCE_S)
    assert called == ["first", "last"]


def test_a_timer_that_is_due_can_be_cancelled_by_the_one_before_it(loop: Loop) -> None:
    called: list[str] = []
    timers: list[Timer] = []

    def cancel_the_second() -> None:
        timers[1].cancel()

    timers.append(loop.call_at(loop.now, cancel_the_second))
    timers.append(loop.call_at(loop.now, lambda: called.append("second")))
    loop.turn(PATIENCE_S)
    loop.turn(0.0)
    assert called == []


def test_a_timer_for_now_that_a_timer_makes_waits_for_the_next_turn(loop: Loop) -> None:
    turns: list[int] = []

    def again() -> None:
        turns.append(len(turns))
        loop.call_at(loop.now, again)

    again()
    loop.turn(PATIENCE_S)
    loop.turn(PATIENCE_S)
    assert turns == [0, 1, 2]


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    """Each check has a timeout, and hardly one of them comes."""
    called: list[int] = []
    loop.call_at(loop.now + 0.001, lambda: called.append(1))
    for _ in range(10_000):
        loop.call_at(loop.now + 3600, lambda: called.append(2)).cancel()
    assert loop.pending <= 2 * loops.MOST_CANCELLED
    while not called:
        loop.turn(PATIENCE_S)
    assert called == [1]


def test_events_come_before_timers(loop: Loop) -> None:
    """An answer that has arrived while the process was stopped is no timeout."""
    ours, theirs = socket.socketpair()
    called: list[str] = []
    with ours, theirs:
        loop.watch(ours.fileno(), select.EPOLLIN, lambda _: called.append("answer"))
        loop.call_at(loop.now, lambda: called.append("timeout"))
        theirs.send(b"x")
        loop.turn(PATIENCE_S)
        loop.unwatch(ours.fileno())
    assert called == ["answer", "timeout"]


def test_a_descriptor_that_is_closed_and_used_again_in_a_turn_gets_no_old_event(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[str] = []

    def on_events(_: int) -> None:
        """Whichever is first closes both, and puts a silent one in the other's place."""
        called.append("old")
        for ours, _theirs in pairs:
            loop.unwatch(ours.fileno())
        for number, (ours, theirs) in enumerate(pairs):
            silent, other = socket.socketpair()
            os.dup2(silent.fileno(), ours.fileno(), inheritable=False)
            silent.close()
            theirs.close()
            pairs[number] = (ours, other)
            loop.watch(ours.fileno(), select.EPOLLIN, lambda _: called.append("new"))

    for ours, theirs in pairs:
        loop.watch(ours.fileno(), select.EPOLLIN, on_events)
        theirs.send(b"x")
    loop.turn(PATIENCE_S)
    for ours, theirs in pairs:
        loop.unwatch(ours.fileno())
        ours.close()
        theirs.close()
    assert called == ["old"]


def test_a_bug_costs_one_call(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    called: list[str] = []

    def fail(_: int = 0) -> None:
        raise ZeroDivisionError

    with ours, theirs:
        theirs.send(b"x")
        loop.watch(ours.fileno(), select.EPOLLIN, fail)
        loop.call_at(loop.now, fail)
        loop.call_at(loop.now, lambda: called.append("next"))
        loop.turn(PATIENCE_S)
        loop.unwatch(ours.fileno())
    assert called == ["next"]
    assert caplog.text.count("checker.bug") == 2


def test_what_is_not_watched_any_more_can_be_said_so_again(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop.watch(ours.fileno(), select.EPOLLIN, lambda _: None)
        loop.change(ours.fileno(), select.EPOLLOUT)
        loop.unwatch(ours.fileno())
        loop.unwatch(ours.fileno())


def test_a_process_that_was_stopped_notices() -> None:
    code = (
        "from forwarder.checker import loop as loops\n"
        "loops.STOPPED_S = 0.2\n"
        "loop = loops.Loop()\n"
        "print('begun', flush=True)\n"
        "while not loop.stopped_s:\n"
        "    loop.turn(0.01)\n"
        "print('noticed', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        eventually(lambda: time.monotonic() > stopped_at + 0.3)
        child.send_signal(signal.SIGCONT)
        assert child.stdout.readline() == "noticed\n"
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
