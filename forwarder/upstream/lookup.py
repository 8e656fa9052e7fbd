"""Looking names up. Each look-up blocks a thread of its own.

A look-up may take a minute and cannot be cancelled; so no code waits for a thread, and all of them
end with the process.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.config.address import SRV
from forwarder.system.daemonlog import warn_rarely
from forwarder.upstream.answers import Answer, targets_of
from forwarder.upstream.schedule import MAX_AT_ONCE
from forwarder.upstream.srv import look_up_service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from forwarder.upstream.ttl import Lifetime

log = logging.getLogger(__name__)

# The name does not exist, or has no address; all other errors may be over the next time.
_FINAL: Final = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
# glibc uses about 70 KiB at most; musl gives a thread 128 KiB.
STACK_BYTES: Final = 256 * 1024


def look_up(host: str) -> Answer:
    """Ask the system for the addresses of ``host``, or DNS for the records of a service.

    Blocks as long as the name servers take.
    """
    if host.startswith(SRV):
        return look_up_service(host)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as err:  # a name that IDNA cannot encode
        return Answer((), str(err), is_final=True)
    except OSError as err:
        return Answer((), err.strerror or str(err), is_final=err.errno in _FINAL)
    addresses = targets_of((family, address) for family, _, _, _, address in found)
    return Answer(addresses, "" if addresses else "it has no address")


def with_lifetime(
    look: Callable[[str], Answer], lifetime: Callable[[str], Lifetime | None] | None
) -> Callable[[str], Answer]:
    """``look`` with answers that know how long they are good, if ``lifetime`` can tell."""
    if lifetime is None:
        return look

    def look_up_with(host: str) -> Answer:
        answer = look(host)
        said = lifetime(host) if answer.addresses else None
        if said is None:
            return answer
        if not said.addresses & _texts(answer):
            # The name has moved between the two questions; or it is not DNS that the system asks.
            answer = look(host)
            if not said.addresses & _texts(answer):
                return answer
        return replace(answer, good_for_s=said.seconds)

    return look_up_with


def _texts(answer: Answer) -> set[str]:
    return {str(target.sockaddr[0]).partition("%")[0] for target in answer.addresses}


def look_up_all(hosts: Iterable[str], limit_s: float) -> dict[str, Answer]:
    """Look names up side by side. Blocks ``limit_s`` at most; a missing answer is a failure."""
    now = time.monotonic()
    until = now + limit_s
    answers = {host: Answer((), f"no answer within {limit_s:.0f} s", since=now) for host in hosts}
    lookups = Lookups(look_up)
    lookups.have(len(answers))
    for host in answers:
        lookups.begin(host)
    missing = set(answers)
    with selectors.DefaultSelector() as selector:
        selector.register(lookups, selectors.EVENT_READ)
        while missing and selector.select(max(0.0, until - time.monotonic())):
            for host, answer in lookups.take():
                answers[host] = replace(answer, since=time.monotonic())
                missing.discard(host)
    lookups.close()
    return answers


class Lookups:
    """Threads that look names up, as many as there is work for. They end with the process."""

    def __init__(self, look: Callable[[str], Answer]) -> None:
        """``look`` blocks. Owns a pipe, readable when there is something to :meth:`take`."""
        self._look = look
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()
        self._threads = 0
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        threading.stack_size(STACK_BYTES)

    def fileno(self) -> int:
        """See the constructor."""
        return self._read_fd

    def close(self) -> None:
        """Give up what is under way, without an answer. The threads end as soon as they can."""
        for _ in range(self._threads):
            self._jobs.put(None)
        with self._lock:
            os.close(self._read_fd)
            os.close(self._write_fd)
            self._read_fd = self._write_fd = -1

    def have(self, count: int) -> bool:
        """Start threads up to ``count``, MAX_AT_ONCE at most. False if no more can be started."""
        while self._threads < min(count, MAX_AT_ONCE):
            try:
                threading.Thread(target=self._run, daemon=True).start()
            except RuntimeError as err:  # the limit of processes, or no memory
                what = f"names: cannot start thread {self._threads + 1}: {err}"
                warn_rarely(log, "names: thread", what)
                return False
            self._threads += 1
        return True

    def begin(self, host: str) -> None:
        """Look a name up, as soon as a thread is free."""
        self._jobs.put(host)

    def take(self) -> Iterator[tuple[str, Answer]]:
        """What has been found since the last time."""
        with suppress(BlockingIOError):
            while os.read(self._read_fd, 4096):
                pass
        with suppress(queue.Empty):
            while True:
                yield self._found.get_nowait()

    def _run(self) -> None:
        while (host := self._jobs.get()) is not None:
            try:
                answer = self._look(host)
            except Exception as err:  # a lost thread would be missing forever
                log.exception("names: bug while looking up %s", host)
                answer = Answer((), f"internal error: {err!r}")
            self._found.put((host, answer))
            with self._lock, suppress(BlockingIOError):  # full of wake-ups
                if self._write_fd >= 0:
                    os.write(self._write_fd, b"!")
