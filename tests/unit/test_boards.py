"""Memory that several processes map: its size stays, and only its writer writes."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forwarder.stats.board import BOARD_BYTES, ROWS, Board
from forwarder.stats.rows import SESSIONS, SESSIONS_TOTAL
from forwarder.system import memfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 1 << 16


@pytest.fixture
def board() -> Iterator[Board]:
    it = Board()
    yield it
    it.close()


def in_child(act: Callable[[], bool]) -> bool:
    """What a forked process finds."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            status = 0 if act() else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status < 2
    return status == 0


def test_a_board_is_read_by_a_process_that_was_there_before_it() -> None:
    """As the checker is, when a worker is started: the descriptor comes over a socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:

        def read() -> bool:
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            seen = Board.read_only(fds[0])
            theirs.send(b"mapped")
            theirs.recv(1)
            return seen.row(ROWS + 5)[SESSIONS] == 7 and seen.row(2)[SESSIONS_TOTAL] == 8

        def parent() -> None:
            board = Board()
            row = board.row(ROWS + 5)
            socket.send_fds(ours, [b"b"], [board.fileno()])
            assert ours.recv(10) == b"mapped"
            row[SESSIONS] = 7
            board.row(2)[SESSIONS_TOTAL] = 8
            ours.send(b"g")
            board.close()

        pid = os.fork()
        if pid == 0:
            os._exit(0 if read() else 1)
        parent()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_a_forked_worker_counts_is_seen_by_its_master(board: Board) -> None:
    def count() -> bool:
        board.row(ROWS - 1)[SESSIONS] = 3
        board.row(2 * ROWS - 1)[SESSIONS] = 4
        return True

    row = board.row(ROWS - 1)
    assert in_child(count)
    board.close()
    assert (row[SESSIONS], board.row(2 * ROWS - 1)[SESSIONS]) == (3, 4)


def test_a_reader_cannot_write(board: Board) -> None:
    reader = Board.read_only(os.dup(board.fileno()))
    with pytest.raises(TypeError, match="read-only"):
        reader.row(1)[SESSIONS] = 1
    reader.close()
    board.row(1)[SESSIONS] = 2


def test_a_reader_cannot_make_itself_a_writer(board: Board) -> None:
    """Not by the descriptor, not by opening it again, not by changing the rights of its mapping."""
    fd = board.fileno()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, BOARD_BYTES)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, BOARD_BYTES)
    finally:
        os.close(again)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    size = ctypes.c_size_t(mmap.PAGESIZE)
    assert libc.mprotect(ctypes.c_void_p(at), size, rights) == -1
    assert libc.munmap(ctypes.c_void_p(at), size) == 0


def test_nobody_makes_a_shared_file_shorter() -> None:
    """Who has mapped it would be killed by its next look."""
    fd = memfile.make("test", SIZE)
    try:
        for size in (0, 2 * SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert memfile.is_made(fd, SIZE)
        assert not memfile.is_made(fd, 2 * SIZE)
    finally:
        os.close(fd)
    assert not memfile.is_made(fd, SIZE)


def test_a_file_that_is_no_board_is_not_read_and_is_closed() -> None:
    could_shrink = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(could_shrink, BOARD_BYTES)
    for fd in (could_shrink, memfile.make("test", SIZE), os.open(os.devnull, os.O_RDONLY)):
        with pytest.raises(ValueError, match="not a board"):
            Board.read_only(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_mapping_has_no_descriptor_and_ends_with_what_refers_to_it() -> None:
    fd = memfile.make("forwarder-test", SIZE)
    words = memfile.words_of(fd, SIZE, writable=True)
    os.close(fd)
    row = words[8:16]
    del words
    row[1] = 5
    assert row[1] == 5
    assert mappings() == 1
    del row
    assert mappings() == 0


def mappings() -> int:
    """How many of the file of the test above this process has."""
    with Path("/proc/self/maps").open(encoding="ascii") as lines:
        return sum("/memfd:forwarder-test" in line for line in lines)


def test_a_board_that_cannot_be_mapped_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def words_of(*_: object, **__: object) -> None:
        raise OSError(12, os.strerror(12))

    monkeypatch.setattr(memfile, "words_of", words_of)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Board()  # the check for leaks, which all tests have, is the test


def test_a_file_that_cannot_be_mapped_says_why() -> None:
    fd = memfile.make("test", SIZE)
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(PermissionError, match="Permission denied"):
            memfile.words_of(reading, SIZE, writable=True)
    finally:
        os.close(reading)
        os.close(fd)
