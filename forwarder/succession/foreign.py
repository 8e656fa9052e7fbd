"""Workers of other masters that give us their sessions: an old master's, and orphans.

Each is a giver, see ``supervision.givers``: it is asked for sessions, answers by PARCELS, and is
told what became of them. Decides nothing, and moves nothing itself.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.ipc import consignment
from forwarder.ipc.messages import Op
from forwarder.net.sockets import peer_credentials
from forwarder.succession import orphans
from forwarder.succession.lineage import Line

if TYPE_CHECKING:
    import selectors
    import socket
    from collections.abc import Callable, Iterable, Sequence

    from forwarder.ipc.channel import Message, Received
    from forwarder.succession.lineage import Predecessor

log = logging.getLogger(__name__)

# A worker notices at its next turn that its master was killed, and opens its door then. Arbitrary.
_DOOR_WITHIN_S: Final = 5.0
_KNOCK_AGAIN_S: Final = 0.05
_SEEK_AGAIN_S: Final = 0.25
# How many sessions an orphan has is not known before it has answered: as many as it may give.
_MANY: Final = 100_000


class OldWorker:
    """A worker of an old master, or of one before that, which passes on what we say."""

    is_foreign = True

    def __init__(self, pid: int, before: Predecessor) -> None:
        self.pid = pid
        self.name = f"worker pid={pid} of the old instance"
        self._before = before

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, or nobody is there to pass anything on."""
        return not self._before.is_open or self.is_dead

    @property
    def is_dead(self) -> bool:
        """Whether its master has reported that it has ended."""
        return self._before.is_open and self.pid not in dict(self._before.left.workers)

    def sessions(self) -> int:
        """How many it had a moment ago."""
        return dict(self._before.left.workers).get(self.pid, 0)

    def ask(self, number: int, limit: int, choice: Message | None) -> None:
        """Ask for sessions."""
        self._before.to_worker(self.pid, consignment.move(number, limit, choice or {}))

    def settle(self, number: int, refused: Sequence[int] = ()) -> None:
        """Say what became of them."""
        self._before.to_worker(self.pid, consignment.moved(number, refused=refused))


class Orphan(Line):
    """An orphan that gives us its sessions.

    It has given us its sockets, too, or has none that we need.
    """

    is_foreign = True

    def __init__(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        on_parcels: Callable[[int, Received], None],
        on_places: Callable[[Orphan, list[str]], None] | None = None,
    ) -> None:
        """``sock`` becomes ours. ``on_parcels`` is called with PARCELS, and the process id.

        ``on_places``: we do not know yet whether it is ours, and have to say so then.
        """
        super().__init__(sock, selector)
        self._on_places = on_places
        self.pid, _ = peer_credentials(sock)
        self.name = f"orphan pid={self.pid}"
        self._on_parcels = on_parcels
        self._left = _MANY

    @property
    def is_gone(self) -> bool:
        """Whether it has hung up."""
        return not self.is_open

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return False
        return True

    def sessions(self) -> int:
        """How many it has, by its last answer."""
        return self._left

    def ask(self, number: int, limit: int, choice: Message | None) -> None:
        """Ask for sessions."""
        self._send(consignment.move(number, limit, choice or {}))

    def settle(self, number: int, refused: Sequence[int] = ()) -> None:
        """Say what became of them."""
        self._send(consignment.moved(number, refused=refused))

    def take(self) -> None:
        """Say that it is ours: it lets its sessions end, and gives them."""
        self._send(orphans.TAKEN_MESSAGE)

    def leave(self) -> None:
        """It is not ours: hang up."""
        self._end()

    def _handle(self, received: Received) -> None:
        # Sockets that come first are shared with us already, or ours are beside them.
        if received.message["op"] == orphans.END and self._on_places is not None:
            self._on_places(self, orphans.read_places(received.message))
        elif received.message["op"] == Op.PARCELS:
            left, busy = received.message["left"], received.message["busy"]
            if isinstance(left, int) and isinstance(busy, int):
                self._left = left + busy
            self._on_parcels(self.pid, received)

    def _on_end(self) -> None:
        self._left = 0


class Taking(Protocol):
    """What takes sessions from givers: see ``supervision.moves``."""

    def add(self, giver: OldWorker | Orphan) -> None:
        """Take all sessions of a giver, until it has none left or is gone."""

    def on_message(self, pid: int, received: Received) -> None:
        """PARCELS of a process."""


class Foreigners:
    """All workers of other masters that give us their sessions. Owns the lines to orphans."""

    def __init__(self, selector: selectors.BaseSelector, taking: Taking) -> None:
        """``taking`` has sessions from them as soon as there are workers for these."""
        self.uid = os.geteuid()  # that workers run as
        # Whether we serve one of these places.
        self.is_wanted: Callable[[Iterable[str]], bool] = lambda _: False
        self._selector = selector
        self._taking = taking
        self._known: set[int] = set()
        self._orphans: list[Orphan] = []
        self._missed: dict[int, float] = {}  # orphans whose door is not found yet, and until when
        self._knock_at: float | None = None
        self._visited: set[str] = set()
        self._is_unheard = False  # a predecessor that has not said what it has left
        self._seek_at: float | None = None
        self._seek_until = 0.0

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        dates = [self._knock_at, self._seek_at, *(one.deadline for one in self._orphans)]
        return min((at for at in dates if at is not None), default=None)

    def keep(self, door: socket.socket) -> None:
        """An orphan has given us its sockets; its sessions follow. The connection becomes ours."""
        orphan = Orphan(door, self._selector, self._taking.on_message)
        self._orphans.append(orphan)
        self._taking.add(orphan)

    def seek(self, now: float) -> None:
        """Look for orphans of this instance for a while: not all may have opened their doors."""
        self._seek_at, self._seek_until = now, now + _DOOR_WITHIN_S

    def turn(self, now: float, before: Predecessor | None) -> None:
        """Notice workers that an old master reports, and those of one that was killed."""
        self._orphans = [one for one in self._orphans if one.is_open]
        for orphan in self._orphans:
            orphan.turn(now)
        if self._seek_at is not None and now >= self._seek_at:
            self._seek_at = now + _SEEK_AGAIN_S if now < self._seek_until else None
            for door in orphans.new_doors(self.uid, self._visited):
                on_parcels = self._taking.on_message
                self._orphans.append(Orphan(door, self._selector, on_parcels, self._recognise))
        if before is None:
            return
        if before.is_lost and not self._is_unheard:
            self._is_unheard = True
            self.seek(now)
        for pid, _ in before.left.workers:
            if pid not in self._known:
                self._known.add(pid)
                self._taking.add(OldWorker(pid, before))
        while before.orphaned:
            self._missed[before.orphaned.pop()] = now + _DOOR_WITHIN_S
        self._knock(now)

    def _recognise(self, orphan: Orphan, places: list[str]) -> None:
        """An orphan has said where it listens, or has listened."""
        if self.is_wanted(places):
            log.info("inherit: %s is ours", orphan.name)
            orphan.take()
            self._taking.add(orphan)
        else:
            orphan.leave()

    def _knock(self, now: float) -> None:
        """Look for the doors of workers whose master was killed while we took their sessions."""
        for pid, until in tuple(self._missed.items()):
            try:
                door = orphans.door_of(pid, self.uid)
            except OSError as err:
                log.error("upgrade: cannot take the sessions of orphan %d over: %s", pid, err)
                del self._missed[pid]
                continue
            if door is not None:
                with suppress(OSError):  # it has just ended
                    door.send(orphans.TAKEN)
                self.keep(door)
            if door is not None or now >= until:
                del self._missed[pid]
        self._knock_at = now + _KNOCK_AGAIN_S if self._missed else None

    def close(self) -> None:
        """Hang up; orphans go on with what they still have."""
        for orphan in self._orphans:
            orphan.close()
