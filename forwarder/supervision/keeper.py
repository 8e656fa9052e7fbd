"""What workers have deposited: descriptors of their sessions, so that these outlive them.

The master's. It keeps them and does not look into them; who adopts the sessions of a dead worker
finds out whether they are whole. Never blocks.
"""

from __future__ import annotations

import logging
import os
import resource
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from forwarder.ipc import deposit
from forwarder.ipc.consignment import MAX_SESSION_FDS, MAX_SESSIONS, Consignment
from forwarder.ipc.deposit import KEPT, ROW, DepositMemory, Word, unpack_server
from forwarder.net.sockets import waiting_bytes
from forwarder.stats.board import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.ipc.channel import Received

log = logging.getLogger(__name__)

# Rows of a worker's memory are address space until they are used; more descriptors than this no
# worker has. Sessions beyond are not deposited.
_MOST_DESCRIPTORS: Final = 1 << 20
# Descriptors that are left to everything else in the master: an eighth of its limit, and no fewer
# than this. Arbitrary.
_LEAST_LEFT: Final = 128
_NONE: Final = -1


@dataclass(slots=True)
class _Kept:
    """A pipe: which one of those that had its number, and both its ends."""

    serial: int
    fds: list[int]


@dataclass(frozen=True, slots=True)
class _Terms:
    """Those of a rule, and the row that counts it."""

    row: int
    terms: dict[str, object]


class Deposit:
    """That of one worker. Owns the descriptors. A session has the number of its row in memory."""

    def __init__(self, memory: DepositMemory) -> None:
        self.memory = memory
        self.terms: dict[int, _Terms] = {}
        self._serials = array("I")  # 0: there is no such session
        self._clients = array("i")
        self._upstreams = array("i")
        self._pipes: dict[int, _Kept] = {}
        self.sessions = 0

    def keep(self, numbers: array[int], fds: list[int]) -> None:
        """Keep sessions, in place of those that had their numbers; takes the descriptors over.

        ``numbers``: number and serial of each, ``fds``: client and upstream. Raises ValueError,
        with nothing taken.
        """
        end = max(numbers[::2], default=0) + 1
        if end > self.memory.descriptors:
            raise ValueError("not a descriptor of a session")
        serials, clients, upstreams = self._serials, self._clients, self._upstreams
        if end > len(serials):
            more = end + 64 - len(serials)
            serials.extend([0] * more)
            clients.extend([_NONE] * more)
            upstreams.extend([_NONE] * more)
        for i in range(0, len(numbers), 2):  # no call for each: there are many
            number = numbers[i]
            if serials[number]:
                self.drop(number)
            serials[number] = numbers[i + 1]
            clients[number], upstreams[number] = fds[i], fds[i + 1]
        self.sessions += len(numbers) // 2

    def drop(self, number: int) -> None:
        """Close a session, if there is one."""
        if number < len(self._serials) and self._serials[number]:
            self._serials[number] = 0
            os.close(self._clients[number])
            os.close(self._upstreams[number])
            self.sessions -= 1

    def keep_pipes(self, numbers: array[int], fds: list[int]) -> None:
        """Keep pipes: number and serial of each, and both ends, which it takes over."""
        for i in range(0, len(numbers), 2):
            self.drop_pipe(numbers[i])
            self._pipes[numbers[i]] = _Kept(numbers[i + 1], fds[i : i + 2])

    def drop_pipe(self, number: int) -> None:
        """Close a pipe, if there is one."""
        kept = self._pipes.pop(number, None)
        for fd in kept.fds if kept is not None else ():
            os.close(fd)

    def close(self) -> None:
        """Close all that is left."""
        for number in range(len(self._serials)):
            self.drop(number)
        for number in tuple(self._pipes):
            self.drop_pipe(number)

    def rows(self) -> Iterator[_Row]:
        """The sessions that the worker had when it died, and that it had not ended."""
        serials = self.memory.serials
        for number, serial in enumerate(self._serials):
            if serial and serials[number] == serial:
                yield _Row(number, *ROW.unpack_from(self.memory.rows, number * ROW.size)[:-1])

    def take(self, number: int) -> list[int]:
        """The descriptors of a session, which become the caller's."""
        self._serials[number] = 0
        self.sessions -= 1
        return [self._clients[number], self._upstreams[number]]

    def full_pipes(self) -> dict[int, list[int]]:
        """Pipes with data in them, by the descriptor that it was read from in the worker.

        They become the caller's.
        """
        found = {}
        for number, kept in tuple(self._pipes.items()):
            note = self.memory.notes[number]
            with suppress(OSError):
                if note >> 32 == kept.serial and waiting_bytes(kept.fds[0]):
                    found[note & 0xFFFFFFFF] = self._pipes.pop(number).fds
        return found


@dataclass(slots=True)
class _Row:
    """What a worker has said of a session, see ``deposit.ROW``."""

    number: int
    terms: int
    offset: int
    id: int
    started_at: float
    connecting_s: float
    upstream_fd: int
    server_and_adoptions: int
    adopted_at: float


@dataclass(slots=True)
class Estate:
    """The sessions of a dead worker. ``by_row``: how many there are of each rule and server."""

    consignments: list[Consignment] = field(default_factory=list)
    by_row: Counter[int] = field(default_factory=Counter)


class Keeper:
    """All deposits. ``refused``: sessions that could not be kept, as descriptors have run out."""

    def __init__(self, server_name: Callable[[int], str | None]) -> None:
        """``server_name`` gives the name of the server that a row counts."""
        self._server_name = server_name
        self._deposits: list[Deposit] = []
        self._full_at: int | None = None  # how many sessions there were when they ran out
        self.refused = 0

    @property
    def sessions(self) -> int:
        """How many are kept."""
        return sum(one.sessions for one in self._deposits)

    def describe(self) -> dict[str, int]:
        """What is deposited, as in the status."""
        return {"deposited": self.sessions, "deposits_refused": self.refused}

    def open(self) -> Deposit:
        """For a worker that is about to be forked. Raises OSError."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        made = Deposit(DepositMemory(min(limit, _MOST_DESCRIPTORS)))
        made.memory.has_room = self._full_at is None
        self._deposits.append(made)
        return made

    def close(self, one: Deposit) -> None:
        """Keep nothing of a worker any more."""
        if one in self._deposits:
            self._deposits.remove(one)
            one.close()

    # -- messages of a worker

    def on_message(self, to: Deposit, received: Received) -> None:
        """Take in a message of ``ipc.deposit``, or TERMS.

        Raises ValueError or KeyError for nonsense.
        """
        if not received.raw:
            self._on_terms(to, received)
            return
        word, numbers = deposit.read(received.raw)
        if word is Word.GONE:
            for number in numbers:
                to.drop(number)
            self._look_for_room()
        elif word is Word.PIPES_GONE:
            for number in numbers:
                to.drop_pipe(number)
        elif self._has_room_for(received, len(numbers) // 2):
            if word is Word.KEEP:
                to.keep(numbers, received.fds)
            else:
                to.keep_pipes(numbers, received.fds)
            received.fds.clear()

    def _on_terms(self, to: Deposit, received: Received) -> None:
        """The terms of a rule of which sessions are deposited."""
        number, row, terms = deposit.read_terms(received)
        if not 0 < row < ROWS:
            raise ValueError("not the row of a rule")
        to.terms[number] = _Terms(row, terms)

    def _has_room_for(self, received: Received, count: int) -> bool:
        """Whether descriptors are left for others beside those of so many that have come."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        left = limit - max(received.fds, default=0)  # the kernel gives the lowest that is free
        if len(received.fds) == 2 * count and left > max(_LEAST_LEFT, limit // 8):
            return True
        if not received.is_truncated and len(received.fds) != 2 * count:
            raise ValueError("not all descriptors were sent")
        self.refused += count
        if self._full_at is None:
            self._full_at = self.sessions
            self._say_room(has_room=False)
            log.warning(
                "keeper.full: %d sessions are deposited, and the limit of %d open files leaves no "
                "room for more; if their worker dies, younger ones end with it; raise the limit "
                "(LimitNOFILE=, ulimit -n)",
                self._full_at,
                limit,
            )
        return False

    def _look_for_room(self) -> None:
        """Accept more again, when a tenth of those has ended that there were."""
        if self._full_at is not None and self.sessions <= self._full_at * 9 // 10:
            self._full_at = None
            self._say_room(has_room=True)

    def _say_room(self, *, has_room: bool) -> None:
        for one in self._deposits:
            one.memory.has_room = has_room

    # -- after a worker's death

    def give_up(self, one: Deposit, *, is_suspect: bool) -> Estate:
        """What becomes of the sessions of a worker that is dead: others may go on with them.

        ``is_suspect``: one of them may be what it has died of. The rest is closed.
        """
        estate = Estate()
        pipes = one.full_pipes()
        parcels: list[tuple[_Row, list[str], list[int]]] = []
        count = 0
        try:
            for row in one.rows():
                if row.terms not in one.terms:
                    continue
                fds = one.take(row.number)
                waiting = []
                for fd in (row.number, row.upstream_fd):
                    ends = pipes.pop(fd, [])
                    waiting.append("pipe" if ends else "")
                    fds += ends
                if len(parcels) == MAX_SESSIONS or count + len(fds) > MAX_SESSION_FDS:
                    estate.consignments += self._consign(
                        one, parcels, estate.by_row, is_suspect=is_suspect
                    )
                    parcels, count = [], 0
                parcels.append((row, waiting, fds))
                count += len(fds)
            if parcels:
                estate.consignments += self._consign(
                    one, parcels, estate.by_row, is_suspect=is_suspect
                )
        finally:
            for ends in pipes.values():
                for fd in ends:
                    os.close(fd)
            self.close(one)
        self._look_for_room()
        return estate

    def _consign(
        self,
        one: Deposit,
        parcels: list[tuple[_Row, list[str], list[int]]],
        by_row: Counter[int],
        *,
        is_suspect: bool,
    ) -> list[Consignment]:
        """Put some sessions into a consignment, if there are descriptors for it."""
        used: dict[int, int] = {}
        for row, _, _ in parcels:
            used.setdefault(row.terms, len(used))
        described = []
        counted: Counter[int] = Counter()
        for row, waiting, _ in parcels:
            server, adoptions, is_counted = unpack_server(row.server_and_adoptions)
            counted[one.terms[row.terms].row] += 1
            if server:
                counted[server] += 1
            name = self._server_name(server) if server else None
            described.append(
                {
                    "kind": KEPT,
                    "id": row.id,
                    "terms": used[row.terms],
                    "client": "",
                    "state": "relaying",
                    "offset": row.offset,
                    "started_at": row.started_at,
                    "connected_at": row.started_at + row.connecting_s,
                    "adoptions": adoptions,
                    "server": None if name is None else [name, server, is_counted],
                    "c2u": {"waiting": waiting[0]},
                    "u2c": {"waiting": waiting[1]},
                    "more": {"adopted_at": row.adopted_at, "is_suspect": is_suspect},
                }
            )
        content = {
            "rows": [one.terms[number].row for number in used],
            "terms": [one.terms[number].terms for number in used],
            "sessions": described,
        }
        fds = [fds for _, _, fds in parcels]
        try:
            made = Consignment.of(0, content, fds)
        except OSError as err:
            log.error("keeper: %d sessions end, as there is no descriptor left: %s", len(fds), err)
            Consignment(0, sessions=list(enumerate(fds))).abort()
            return []
        by_row.update(counted)
        return [made]
