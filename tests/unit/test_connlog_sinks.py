"""Sinks and drains: whole lines in order, exact counts, one message, whatever the place does.

Real files and pipes where they can be made to fail: a file by RLIMIT_FSIZE, which cuts a write
short as a full disk does.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import PATIENCE_S, eventually

from forwarder.config.model import LogFormat
from forwarder.connlog.drains import (
    PIPE_BUF,
    DatagramDrain,
    FileDrain,
    StreamDrain,
    Unwritten,
    to_journal,
    to_syslog,
)
from forwarder.connlog.log import ConnectionLog
from forwarder.connlog.sinks import BLOCK_BYTES, MAX_WAITING_BYTES, Sink

if TYPE_CHECKING:
    from collections.abc import Iterator


class ScriptedDrain:
    """Fails as a script says: for each block how many of its last lines are not written."""

    name = "scripted"

    def __init__(self, script: list[int | None]) -> None:
        self.script = script
        self.lines: list[bytes] = []
        self.blocks = 0
        self.is_closed = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def write(self, lines: bytes) -> None:
        self.may_go_on.wait(PATIENCE_S)
        every = lines.splitlines(keepends=True)
        failing = self.script[self.blocks] if self.blocks < len(self.script) else None
        self.blocks += 1
        if failing is None:
            self.lines += every
            return
        missing = min(failing, len(every))
        self.lines += every[: len(every) - missing]
        raise Unwritten(missing, OSError(errno.ENOSPC, "No space left on device"))

    def close(self) -> None:
        self.is_closed = True


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.lists(st.one_of(st.none(), st.integers(1, 9)), max_size=12),
)
def test_a_sink_keeps_the_order_counts_exactly_and_says_each_thing_once(
    blocks: list[int], script: list[int | None]
) -> None:
    drain = ScriptedDrain(script)
    sink = Sink(drain)
    expected: list[bytes] = []
    lost, is_failing, messages = 0, False, []
    with collected_log() as heard:
        for number, count in enumerate(blocks):
            lines = [f"{number}.{i}\n" for i in range(count)]
            for line in lines:
                sink.add(line)
            sink.flush()
            failing = script[number] if number < len(script) else None
            missing = min(failing or 0, count)
            expected += [line.encode() for line in lines[: count - missing]]
            lost += missing
            if failing is None:
                messages += ["resumed"] * is_failing
            else:
                messages += ["failed"] * (not is_failing)
            is_failing = failing is not None
        sink.end()
        sink.join(PATIENCE_S)
    assert drain.lines == expected
    assert (sink.dropped, sink.waiting_bytes) == (lost, 0)
    assert drain.is_closed
    once = list(dict.fromkeys(messages))  # of what happens again within seconds nothing is said
    assert [text.partition(" ")[0] for text in heard] == [
        f"log.{what}" for what in [*once, *["closed"] * is_failing]
    ]


@contextmanager
def collected_log() -> Iterator[list[str]]:
    """What sinks log meanwhile; hypothesis runs many examples within one test's ``caplog``."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("forwarder.connlog.sinks")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def test_the_message_of_the_end_has_the_number_of_all_lines_that_were_lost() -> None:
    drain = ScriptedDrain([2, 1, None])
    sink = Sink(drain)
    with collected_log() as heard:
        for text in "abc":
            for line in (f"{text}1\n", f"{text}2\n"):
                sink.add(line)
            sink.flush()
        sink.end()
        sink.join(PATIENCE_S)
    assert heard == [
        "log.failed to=scripted: No space left on device; lines are dropped until it can be "
        "written to again",
        "log.resumed to=scripted: 3 lines were lost",
    ]
    assert drain.lines == [b"b1\n", b"c1\n", b"c2\n"]


def test_a_stalled_place_costs_bounded_memory_and_the_lines_beyond_it_are_counted() -> None:
    drain = ScriptedDrain([])
    drain.may_go_on.clear()
    sink = Sink(drain)
    line = "x" * 1023 + "\n"
    total = 0
    with collected_log() as heard:
        while not sink.dropped:
            sink.add(line)
            total += 1
        for _ in range(1000):
            sink.add(line)
        total += 1000
        assert sink.waiting_bytes <= MAX_WAITING_BYTES + BLOCK_BYTES
        drain.may_go_on.set()
        eventually(lambda: sink.waiting_bytes == 0)
        sink.add(line)
        sink.end()
        sink.join(PATIENCE_S)
    assert len(drain.lines) + sink.dropped == total + 1
    assert [text.partition(" ")[0] for text in heard] == ["log.failed", "log.resumed"]
    assert f"{sink.dropped} lines" in heard[1]


def test_a_stalled_place_does_not_hold_up_the_others(tmp_path: Path) -> None:
    near, far = os.pipe()
    os.set_blocking(far, True)
    with suppress(BlockingIOError):
        os.set_blocking(far, False)
        while True:
            os.write(far, bytes(65536))
    os.set_blocking(far, True)  # as stderr may be
    path = tmp_path / "log"
    log = ConnectionLog()
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    log.set_places([(LogFormat.JSON, "stuck", far), (LogFormat.JSON, str(path), fd)])
    (_, stuck), (_, free) = log._sinks
    for sink in (stuck, free):
        sink.add("line\n")
    log.flush()
    eventually(lambda: path.read_text() == "line\n")
    assert stuck.waiting_bytes == 5
    os.close(near)  # EPIPE
    log.close()
    assert log.dropped == 1


def test_without_a_thread_lines_are_lost_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at a limit of threads. Result: nothing fails, and the next block is written."""

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    drain = ScriptedDrain([])
    sink = Sink(drain)
    with collected_log() as heard:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            sink.add("a\n", "b\n")
            sink.flush()
        assert (sink.dropped, sink.waiting_bytes) == (2, 0)
        sink.add("c\n")
        sink.flush()
        sink.end()
        sink.join(PATIENCE_S)
    assert drain.lines == [b"c\n"]
    assert drain.is_closed
    assert any("can't start new thread" in text for text in heard)


def test_what_nobody_thought_of_does_not_end_the_thread() -> None:
    class Broken(ScriptedDrain):
        def write(self, lines: bytes) -> None:
            if not self.blocks:
                self.blocks = 1
                raise RuntimeError("a bug")
            super().write(lines)

    drain = Broken([])
    sink = Sink(drain)
    with collected_log() as heard:
        for text in ("a\n", "b\n"):
            sink.add(text)
            sink.flush()
        sink.end()
        sink.join(PATIENCE_S)
    assert (drain.lines, sink.dropped) == ([b"b\n"], 1)
    assert heard[0] == "log.bug to=scripted"


# -- files


LINES = st.lists(st.integers(1, 40).map(lambda size: b"x" * (size - 1) + b"\n"), min_size=1)
STEPS = st.lists(st.tuples(st.sampled_from("abr"), LINES, st.integers(0, 60)), max_size=12)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may become larger; Python ignores SIGXFSZ, so that a write says EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(STEPS)
def test_a_file_of_two_workers_that_fills_up_has_whole_lines_only(
    steps: list[tuple[str, list[bytes], int]],
) -> None:
    """``r`` is room: from there on the file may grow by so many bytes.

    *Result*: what is in the file are exactly the lines that were not reported as missing.
    """
    with TemporaryDirectory() as name:
        path = Path(name) / "log"
        fds = [os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) for _ in "ab"]
        drains = dict(zip("ab", [FileDrain("log", fd) for fd in fds], strict=True))
        expected = b""
        limit = 100
        for who, lines, room in steps:
            if who == "r":
                limit = len(expected) + room
                continue
            missing = 0
            with file_limit(limit):
                try:
                    drains[who].write(b"".join(lines))
                except Unwritten as err:
                    missing = err.lines
            written = lines[: len(lines) - missing]
            expected += b"".join(written)
            assert path.read_bytes() == expected
            if missing:
                assert len(expected) + len(lines[len(written)]) > limit
        for drain in drains.values():
            drain.close()


def test_a_line_that_a_killed_worker_has_left_is_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"whole\npa")
    drain = FileDrain("log", os.open(path, os.O_RDWR | os.O_APPEND))
    drain.write(b"next\n")
    drain.write(b"last\n")
    drain.close()
    assert path.read_bytes() == b"whole\npa\nnext\nlast\n"


def test_a_file_that_may_only_be_written_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x\n")
    drain = FileDrain("log", os.open(path, os.O_WRONLY | os.O_APPEND))
    drain.write(b"y\n")
    drain.close()
    assert path.read_bytes() == b"x\ny\n"


def test_lines_of_many_writers_do_not_mix_in_a_file(tmp_path: Path) -> None:
    """Processes, since the lock is theirs; of a few hundred lines each, in large blocks."""
    path = tmp_path / "log"
    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                drain = FileDrain("log", os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT))
                for block in range(20):
                    drain.write(b"%d %d %s\n" % (number, block, b"y" * 90) * 200)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    lines = path.read_bytes().splitlines()
    assert len(lines) == 4 * 20 * 200
    assert {len(line) for line in lines} <= {94, 95}


# -- pipes and sockets


@given(
    st.lists(st.tuples(LINES.map(b"".join), st.integers(0, 20_000)), max_size=12),
    st.sampled_from(["pipe", "socket"]),
)
def test_a_pipe_whose_reader_is_slow_gets_lines_in_order_and_the_rest_is_counted(
    steps: list[tuple[bytes, int]], kind: str
) -> None:
    """Each block is repeated until it is larger than what the reader takes between two of them."""
    near, far = narrow_pipe() if kind == "pipe" else narrow_socket()
    drain = StreamDrain(kind, far, patience_ms=1)
    received, sent, lost = b"", b"", 0
    for number, (lines, taken) in enumerate(steps):
        block = b"m%d\n" % number + lines * 300
        sent += block
        try:
            drain.write(block)
        except Unwritten as err:
            lost += err.lines
        received += read_some(near, taken)
    received += read_some(near, 1 << 20)
    drain.close()
    os.close(near)
    if kind == "pipe":  # where nothing is ever cut
        assert received.count(b"\n") == sent.count(b"\n") - lost
        assert not received or received.endswith(b"\n")
    assert received.count(b"\n") >= sent.count(b"\n") - lost
    left = iter(sent.splitlines())
    markers = [line for line in received.splitlines() if line.startswith(b"m")]
    assert all(any(line == other for other in left) for line in markers)


def narrow_pipe() -> tuple[int, int]:
    near, far = os.pipe()
    fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, 4096)
    for fd in (near, far):
        os.set_blocking(fd, False)
    return near, far


def narrow_socket() -> tuple[int, int]:
    one, two = socket.socketpair()
    two.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    one.setblocking(False)
    two.setblocking(False)
    return one.detach(), two.detach()


def read_some(fd: int, count: int) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while len(found) < count and (part := os.read(fd, count - len(found))):
            found += part
    return found


def test_a_line_that_was_cut_in_a_stream_is_ended_before_the_next() -> None:
    near, far = os.pipe()
    os.set_blocking(far, False)
    drain = StreamDrain("pipe", far, patience_ms=1)
    long = b"l" * (1 << 17) + b"\n"  # longer than what fits, and than PIPE_BUF
    for missing in (1, 2):  # the second time nothing fits at all
        with pytest.raises(Unwritten) as caught:
            drain.write(b"first\n" + long)
        assert caught.value.lines == missing
    received = read_blocking(near)
    drain.write(b"next\n")
    received += read_blocking(near)
    assert received.splitlines()[0] == b"first"
    assert received.splitlines()[-1] == b"next"
    assert set(received.splitlines()[1]) == {ord("l")}
    drain.close()
    os.close(near)


def read_blocking(fd: int) -> bytes:
    os.set_blocking(fd, False)
    return read_some(fd, 1 << 20)


def test_a_pipe_without_a_reader_loses_lines_and_raises_nothing_else() -> None:
    near, far = os.pipe()
    os.close(near)
    drain = StreamDrain("pipe", far)
    with pytest.raises(Unwritten, match="Broken pipe") as caught:
        drain.write(b"a\nb\n")
    assert caught.value.lines == 2
    drain.close()


def test_portions_are_as_large_as_they_may_be_and_no_larger() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    drain = StreamDrain("socket", two.detach())
    with one:
        drain.write(b"x" * 99 + b"\n" + (b"y" * 99 + b"\n") * 80)
        drain.close()
        sizes = []
        while part := one.recv(1 << 16):
            assert part.endswith(b"\n")
            sizes.append(len(part))
    assert max(sizes) < PIPE_BUF
    assert sizes[0] > PIPE_BUF - 101
    assert sum(sizes) == 8100


# -- daemons


def test_a_daemon_gets_a_datagram_for_each_line_and_is_found_again(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    drain = DatagramDrain("syslog", path, to_syslog)
    with pytest.raises(Unwritten) as caught:
        drain.write(b"a\nb\n")
    assert caught.value.lines == 2
    for word in (b"one", b"two"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            daemon.bind(path)
            daemon.settimeout(PATIENCE_S)
            drain.write(word + b"\nmore\n")
            assert daemon.recv(100) == b"<30>forwarder[%d]: %s" % (os.getpid(), word)
            assert daemon.recv(100).endswith(b": more")
        Path(path).unlink()
    drain.close()


def test_a_daemon_that_does_not_read_costs_a_wait_and_the_lines_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwarder.connlog.drains.PATIENCE_MS", 10)
    path = str(tmp_path / "log")
    drain = DatagramDrain("journal", path, to_journal)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(path)
        daemon.setblocking(False)
        with pytest.raises(Unwritten) as caught:
            drain.write(b"line\n" * 1000)
        received = 0
        with suppress(BlockingIOError):
            while True:
                assert daemon.recv(100) == (
                    b"SYSLOG_IDENTIFIER=forwarder\nPRIORITY=6\nMESSAGE=line\n"
                )
                received += 1
        assert received + caught.value.lines == 1000
    drain.close()


def test_places_that_change_lose_nothing(tmp_path: Path) -> None:
    log = ConnectionLog()
    for number in range(20):
        fd = os.open(tmp_path / str(number), os.O_RDWR | os.O_APPEND | os.O_CREAT)
        log.set_places([(LogFormat.JSON, str(number), fd)])
        for i in range(50):
            log._sinks[0][1].add(f"{number} {i}\n")
    log.close()
    for number in range(20):
        lines = (tmp_path / str(number)).read_text().splitlines()
        assert lines == [f"{number} {i}" for i in range(50)]
    assert log.dropped == 0
