"""The set of a worker's sockets where handlers fail in ways that nobody thought of."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.by_hand import Bench

    from forwarder.relay.poller import Handler


class Broken:
    """Fails, and fails again when it is to end for that."""

    def on_events(self, mask: int) -> None:
        raise ZeroDivisionError(mask)

    def on_turn(self) -> None:
        raise ZeroDivisionError

    def on_bug(self) -> None:
        raise ZeroDivisionError


class Sound:
    """Counts."""

    def __init__(self) -> None:
        self.events = self.turns = 0

    def on_events(self, mask: int) -> None:
        assert mask
        self.events += 1

    def on_turn(self) -> None:
        self.turns += 1

    def on_bug(self) -> None:
        raise AssertionError


def test_who_fails_twice_costs_the_others_of_a_batch_nothing(bench: Bench) -> None:
    """An edge is told once: who is not told now never is."""
    poller, broken, sound = bench.relay.poller, Broken(), Sound()
    handlers: list[Handler] = [broken, sound]
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        for (near, far), handler in zip(pairs, handlers, strict=True):
            stack.enter_context(near)
            stack.enter_context(far)
            poller.register(far.fileno(), handler)
            near.send(b"x")
        poller.call_again(broken)
        poller.call_again(sound)
        poller.turn()
    assert (sound.events, sound.turns) == (1, 1)
    assert poller._in_turn is False


def test_what_cannot_be_closed_leaves_nothing_else_open(bench: Bench) -> None:
    closed: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError

    for number in range(3):
        bench.relay.poller.defer(fail)
        bench.relay.poller.defer(partial(closed.append, number))
    bench.loop.pass_time(0)
    assert closed == [0, 1, 2]
