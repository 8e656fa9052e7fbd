"""One way of a session whose bulk goes through a pipe with splice(2) and never enters the process.

Small messages are copied as in :class:`Direction`: two system calls, against three or four here.

Theory of operation
-------------------
``splice(socket -> pipe)`` answers EAGAIN when the socket is empty *or* the pipe is full, and does
not say which. So a pipe is only ever filled when it is empty: EAGAIN then means that the socket is.
A short count says nothing either (the pipe has a limited number of slots, however little is in
each), so the loop goes on until EAGAIN.

A pipe is borrowed for one wake-up and given back empty; only a direction whose ``dst`` is full
keeps it, with the data in it, until ``dst`` takes the rest. So one hot pipe serves most of a
worker's bulk. What was copied and ``dst`` did not take goes into a pipe, too: it outlives this
process there, and in memory it would not.

SPLICE_F_NONBLOCK is only for the pipe; the sockets are O_NONBLOCK. splice(2), pipe(7).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from forwarder.net.pipes import PAGE_BYTES
from forwarder.relay.poller import READ_ON
from forwarder.relay.tcp.direction import READS_ON, SPLICES, Direction
from forwarder.relay.workbench import SMALL_BYTES

if TYPE_CHECKING:
    from forwarder.net.pipes import Pipe
    from forwarder.relay.tcp.direction import Owner
    from forwarder.relay.workbench import Workbench

_FLAGS: Final = 0x01 | 0x02  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK, linux/splice.h
# More than a pipe's nominal size on purpose: its slots hold whole fragments of up to 32 KiB.
CHUNK_BYTES: Final = 1024 * 1024
# This socket cannot be spliced (a protocol or a filter that does not support it): copy.
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class SpliceDirection(Direction):
    """A direction with a second, copy-free way for bulk.

    ``pipe`` is None unless ``dst`` was full; then data waits in it.
    """

    __slots__ = ("pipe", "spliced")

    def __init__(self, bench: Workbench, session: Owner, read_on: int = READS_ON) -> None:
        super().__init__(bench, session, read_on)
        self.pipe: Pipe | None = None
        self.spliced = 0

    def pump_bulk(self, mask: int, room: int) -> None:
        """Move bulk from socket to socket until dry, full, or the budget is used up."""
        pipe = self.bench.pipes.take() if self.read_on & SPLICES else None
        if pipe is None:
            super().pump_bulk(mask, room)
        else:
            self._splice(pipe, mask, room)

    def _splice(self, pipe: Pipe, mask: int, room: int) -> None:
        """Move bulk through ``pipe``, which is given back or kept."""
        pool = self.bench.pipes
        src_fd = self.src.fileno()
        pool.notes[pipe.number] = pipe.mark | src_fd
        moved = 0
        budget, chunk = self.budget_bytes, CHUNK_BYTES
        if room:
            budget = chunk = room
        while moved < budget:
            try:
                count = os.splice(src_fd, pipe.write_fd, chunk, None, None, _FLAGS)
            except BlockingIOError:
                pool.give(pipe)
                self.is_bulk = moved >= SMALL_BYTES
                return
            except OSError as err:
                pool.give(pipe)
                self._on_splice_error(err, mask, room)
                return
            if not count:
                # End of file, or an urgent byte that splice will not pass with a FIN behind it:
                # only recv shows which.
                pool.give(pipe)
                super().pump_bulk(mask | READ_ON, room)
                return
            moved += count
            self.moved += count
            self.spliced += count
            if not self._drain(pipe, count):
                return
        pool.give(pipe)
        self.yield_turn(mask)

    def flush(self) -> bool:
        """Send what waits in the pipe or in memory; False if some of it is still left."""
        pipe = self.pipe
        if pipe is None:
            return self.pending is None or super().flush()
        self.pipe = None
        if not self._drain(pipe, pipe.filled):
            return False
        self.bench.pipes.give(pipe)
        return True

    def keep(self, rest: memoryview) -> None:
        """Keep what ``dst`` did not take, in a pipe if one has room for it."""
        pool = self.bench.pipes
        pipe = pool.take_for_rest()
        if pipe is None:
            super().keep(rest)
        elif pipe.pages * PAGE_BYTES < len(rest):
            pool.give(pipe)
            super().keep(rest)
        else:
            pool.note(pipe, self.src.fileno())
            pipe.filled = os.write(pipe.write_fd, rest)  # all of it: it is empty, pipe(7)
            self.pipe = pipe

    @property
    def holds_data(self) -> bool:
        """Whether something was read that ``dst`` has not taken yet."""
        return self.pipe is not None or self.pending is not None

    def _drain(self, pipe: Pipe, count: int) -> bool:
        """Empty ``pipe`` of its ``count`` bytes; if that is not possible keep it and block."""
        dst_fd = self.dst.fileno()
        left = count
        while left:
            try:
                left -= os.splice(pipe.read_fd, dst_fd, left, None, None, _FLAGS)
            except OSError as err:
                if err.errno == errno.EAGAIN or self.session.can_rest(err):
                    self.pipe = pipe
                    pipe.filled = left
                    self.block()
                    return False
                self.bench.pipes.discard(pipe)
                self.session.on_undeliverable(self, err)
                return False
        return True

    def _on_splice_error(self, err: OSError, mask: int, room: int) -> None:
        if err.errno in _UNSUPPORTED:
            self.read_on &= ~SPLICES  # nothing is in the pipe, so nothing is lost
            super().pump_bulk(mask, room)
        else:
            self.session.on_reset(self, err)

    def stop(self) -> None:
        """Never read again; drop what could not be sent, and the pipe with it."""
        super().stop()
        pipe = self.pipe
        if pipe is not None:
            self.pipe = None
            self.bench.pipes.discard(pipe)
