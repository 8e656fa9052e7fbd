"""Lines on their way to a drain. Writing never blocks the loop that logs.

Theory of operation
-------------------
A sink collects whole lines and hands them over in blocks: when BLOCK_BYTES have come together, or
when it is time. A thread for each sink writes them, because a write(2) to a regular file can block
for as long as its disk likes, and nothing else avoids that; and a stalled place must not hold the
others up. What waits for the thread is bounded by MAX_WAITING_BYTES; beyond it lines are dropped
and counted. The first failure is logged, and at the end of the failures the number of lines lost;
never each.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Final

from forwarder.connlog.drains import Unwritten
from forwarder.system.rarely import Rarely

if TYPE_CHECKING:
    from forwarder.connlog.drains import Drain

log = logging.getLogger(__name__)

# Each block costs about 0.5 ms of switching between the threads under load, however long it is.
BLOCK_BYTES: Final = 256 * 1024
MAX_WAITING_BYTES: Final = 4 * 1024 * 1024


class Sink:
    """Collects the lines of one place, and writes them in a thread that begins with the first.

    Each of the two threads counts in numbers of its own, because ``x += 1`` is not atomic.
    """

    def __init__(self, drain: Drain) -> None:
        self._drain = drain
        self._lines: list[str] = []
        self._size = 0
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._handed = self._dealt_with = 0  # bytes; the second is the thread's
        self._lock = threading.Lock()
        self._dropped = 0  # lines, ever; under the lock, like the next one
        self._lost = 0  # lines, since all was well
        self._failures, self._recoveries = Rarely(), Rarely()  # a place may do both by turns

    @property
    def dropped(self) -> int:
        """Lines that could not be written, ever."""
        return self._dropped

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were handed over and are neither written nor lost."""
        return self._handed - self._dealt_with

    def add(self, *lines: str) -> None:
        """Take whole lines."""
        self._lines += lines
        self._size += sum(map(len, lines))
        if self._size >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over the collected lines."""
        if not self._lines:
            return
        lines, self._lines, self._size = self._lines, [], 0
        if self.waiting_bytes > MAX_WAITING_BYTES:
            self._lose(len(lines), "it takes too long")
            return
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="connection log", daemon=True)
            try:
                thread.start()
            except RuntimeError as err:  # at the limit of threads, pthread_create(3)
                self._lose(len(lines), str(err))
                return
            self._thread = thread
        block = "".join(lines).encode(errors="backslashreplace")
        self._handed += len(block)
        self._queue.put(block)

    def end(self) -> None:
        """Take no more. The thread writes the rest and closes the drain; does not wait for it."""
        self.flush()
        if self._thread is None:
            self._drain.close()
        else:
            self._queue.put(None)

    @property
    def is_finished(self) -> bool:
        """After :meth:`end`: whether nothing more will be written."""
        return self._thread is None or not self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """After :meth:`end`: wait until all is written, ``timeout_s`` at most."""
        if self._thread is not None:
            self._thread.join(max(0.0, timeout_s))
        if not self.is_finished:
            log.warning("log.unfinished to=%s: its last lines may be lost", self._drain.name)

    def _lose(self, lines: int, why: str) -> None:
        """Count lines that are not written; log it if they are the first ones."""
        with self._lock:
            is_first = not self._lost
            self._lost += lines
            self._dropped += lines
        if is_first:
            more = self._failures.note(why, time.monotonic())
            if more is not None:
                log.error(
                    "log.failed to=%s: %s; lines are dropped until it can be written to again%s",
                    self._drain.name,
                    why,
                    more,
                )

    def _on_written(self) -> None:
        with self._lock:
            lost, self._lost = self._lost, 0
        more = self._recoveries.note("", time.monotonic()) if lost else None
        if more is not None:
            log.warning("log.resumed to=%s: %d lines were lost%s", self._drain.name, lost, more)

    def _run(self) -> None:
        while (block := self._queue.get()) is not None:
            try:
                self._drain.write(block)
            except Unwritten as err:
                self._lose(err.lines, str(err))
            except Exception:  # an unforeseen error must not end the thread
                log.exception("log.bug to=%s", self._drain.name)
                self._lose(block.count(b"\n"), "unexpected error")
            else:
                # Not while lines come faster than it takes them: that would be logged over and
                # over.
                if self._lost and self.waiting_bytes <= MAX_WAITING_BYTES // 2:
                    self._on_written()
            self._dealt_with += len(block)
        self._drain.close()
        if self._lost:
            log.warning("log.closed to=%s: %d lines were lost", self._drain.name, self._lost)
