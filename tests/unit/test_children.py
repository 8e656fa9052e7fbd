"""What a forked child keeps, beside what its parent had open and thought of."""

from __future__ import annotations

import gc
import os
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs

from forwarder.system import children
from forwarder.system.children import keep_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = 40  # of each; so many that gaps between those that are kept are of every length


def said_by(child: Callable[[int], str]) -> str:
    """What a forked child says; it gets the descriptor to say it by, which nothing else has."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_fd, child(write_fd).encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def opened() -> Iterator[list[int]]:
    """Descriptors of many kinds, some of which objects own."""
    with ExitStack() as stack:
        found = []
        for _ in range(KINDS):
            ours, theirs = map(stack.enter_context, socket.socketpair())
            found += [ours.fileno(), theirs.fileno()]
            fds = [os.open(os.devnull, os.O_RDONLY), os.memfd_create("test"), *os.pipe()]
            for fd in fds:
                stack.callback(os.close, fd)
            found += fds
        yield found


@pytest.mark.parametrize("size", [None, 1 << 20], ids=["as-the-kernel-says", "unknown"])
def test_it_keeps_the_standard_ones_and_what_is_named_and_nothing_else(
    opened: list[int], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size is not None:
        monkeypatch.setattr(children, "_table_size", lambda: size)
    kept = [*opened[3:7], opened[20], opened[-1]]

    def child(write_fd: int) -> str:
        keep_only([write_fd, *reversed(kept), kept[0], 1])
        return repr(sorted(set(procfs.descriptors(os.getpid())) - {write_fd}))

    assert said_by(child) == repr([0, 1, 2, *sorted(kept)])


def test_nothing_of_the_parent_closes_a_number_that_the_child_has_used_again() -> None:
    """An object that only a circle holds, which the collector of the child would come upon."""

    class Circle:
        def __init__(self) -> None:
            self.sock = socket.socket()
            self.itself = self

    gc.collect()
    circle = Circle()
    fd = circle.sock.fileno()

    def child(write_fd: int) -> str:
        nonlocal circle
        keep_only([write_fd])
        del circle
        read_fd, again_fd = os.pipe()
        while again_fd < fd:
            again_fd = os.dup(read_fd)
        gc.collect()
        return str(fd in procfs.descriptors(os.getpid()))

    try:
        assert said_by(child) == "True"
    finally:
        circle.sock.close()


def test_a_signal_wakes_nobody_but_the_child() -> None:
    """Python writes the number of each into a pipe, which was the parent's."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(write_fd)
    old = signal.signal(signal.SIGUSR1, lambda *_: None)

    def child(say_fd: int) -> str:
        keep_only([say_fd, write_fd])
        os.kill(os.getpid(), signal.SIGUSR1)
        return "done"

    try:
        assert said_by(child) == "done"
        with pytest.raises(BlockingIOError):
            os.read(read_fd, 1)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, old)
        os.close(read_fd)
        os.close(write_fd)
