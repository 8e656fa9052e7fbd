"""Sessions on their way from one process to another: one message, with their descriptors.

::

    who wants     --MOVE {number, limit, and conditions as in LIST}--> giver
    giver         --PARCELS {number, ...} and descriptors--> who wants --the same--> taker
    taker         --TAKEN {number, refused, why}--> who has sent it
    who wanted    --MOVED {number, is_back, refused}--> giver
    giver         --TAKEN {number}--> who wanted, if something was refused

What a parcel says of its session only giver and taker know; it travels as JSON in a memory file,
so that who passes a consignment on neither reads it nor is bound by the size of a message. The
first descriptor is the token (``claim``): the taker claims it before it answers TAKEN, which it
does before anything of the sessions moves. The giver keeps its own descriptors until MOVED; with
``is_back``, or when who has asked is gone, it claims the sessions itself and goes on with them, if
nobody else has. So every step may fail, or be killed, and the sessions have one owner.

A taker that refuses all has not claimed: the same consignment goes to another one. Of one that was
refused in part :meth:`Consignment.only` makes another one, with a token of its own.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from forwarder.ipc import claim
from forwarder.ipc.channel import MAX_FDS, read_memory_file, to_memory_file
from forwarder.ipc.claim import Claimant
from forwarder.ipc.messages import Op
from forwarder.net.sockets import set_abort_on_close

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from forwarder.ipc.channel import Channel, Message, Received

# Of the content. A taker refuses another one as a whole: then sessions end where they are.
VERSION: Final = 1
MAX_SESSIONS: Final = 100
# Beside the token and the content.
MAX_SESSION_FDS: Final = MAX_FDS - 2
# About 400 bytes for each session, and the terms of as many rules. Arbitrary.
_MAX_CONTENT_BYTES: Final = 4 * 1024 * 1024


class Refusal(StrEnum):
    """Why sessions were not taken. CLAIMED: they are another's already; there is nothing to do."""

    NONE = ""
    VERSION = "version"
    DESCRIPTORS = "descriptors"
    LEAVING = "leaving"
    NONSENSE = "nonsense"
    CLAIMED = "claimed"


@dataclass(slots=True)
class Consignment:
    """Sessions on their way, whose descriptors it owns until :meth:`close`; perhaps none.

    ``left``: how many the giver could move as well, or fewer if there are some; ``busy``: how many
    it has that cannot be moved yet, if nothing is left. ``sessions``: where in the content each is
    described, and its descriptors. ``is_foreign``: they are another instance's, counted and held
    there.
    """

    number: int
    left: int = 0
    busy: int = 0
    version: int = VERSION
    token: int = -1
    content: int = -1
    sessions: list[tuple[int, list[int]]] = field(default_factory=list)
    is_foreign: bool = False

    @classmethod
    def of(
        cls, number: int, content: Mapping[str, object], fds: Sequence[list[int]]
    ) -> Consignment:
        """One of sessions that ``content`` describes, in their order, with these descriptors.

        Raises OSError, also if that is more than is read again; the descriptors then stay the
        caller's.
        """
        made = cls(number)
        if fds:
            text = json.dumps(content).encode()
            if len(text) > _MAX_CONTENT_BYTES:
                raise OSError(errno.EFBIG, "too much to say of their rules")
            try:
                made.content = to_memory_file(text)
                made.token = claim.make()
            except OSError:
                made.close()
                raise
            made.sessions = list(enumerate(fds))
        return made

    def __len__(self) -> int:
        return len(self.sessions)

    @property
    def fds(self) -> list[int]:
        """All its descriptors."""
        of_sessions = [fd for _, fds in self.sessions for fd in fds]
        return [self.token, self.content, *of_sessions] if self.sessions else []

    def send(self, channel: Channel) -> None:
        """Send it; it stays the sender's, and has to stay open until it was answered.

        Raises ChannelClosed.
        """
        message: Message = {
            "op": Op.PARCELS,
            "number": self.number,
            "version": self.version,
            "left": self.left,
            "busy": self.busy,
            "sessions": [[place, len(fds)] for place, fds in self.sessions],
            "foreign": self.is_foreign,
        }
        channel.send(message, self.fds)

    @classmethod
    def read(cls, received: Received) -> Consignment:
        """The consignment of a message, whose descriptors become its own.

        Raises ValueError for nonsense, and if descriptors have run out; all are closed then.
        """
        try:
            return cls._read(received)
        except (KeyError, TypeError) as err:
            raise ValueError("not a consignment") from err
        finally:
            received.close()

    @classmethod
    def _read(cls, received: Received) -> Consignment:
        message = received.message
        found = cls(_count(message["number"]), _count(message["left"]), _count(message["busy"]))
        found.version = _count(message["version"])
        found.is_foreign = message.get("foreign") is True
        places = _places(message)
        wanted = sum(count for _, count in places) + 2 if places else 0
        if received.is_truncated or len(received.fds) != wanted:
            raise ValueError("not all descriptors have come")
        if places:
            fds = iter(received.fds)
            found.token, found.content = next(fds), next(fds)
            found.sessions = [(place, [next(fds) for _ in range(n)]) for place, n in places]
            received.fds.clear()
        return found

    def claim(self, claimant: Claimant = Claimant.OTHER) -> bool:
        """Whether its sessions are the caller's from now on; False: another has them."""
        return claim.claim(self.token, claimant)

    def read_content(self) -> dict[str, object]:
        """What it says of its sessions. Raises ValueError for nonsense."""
        try:
            found = json.loads(read_memory_file(self.content, _MAX_CONTENT_BYTES))
        except RecursionError as err:
            raise ValueError("nothing to be read") from err
        if not isinstance(found, dict):
            raise ValueError("not the content of a consignment")  # noqa: TRY004 - as all nonsense
        return found

    def rules(self, places: Iterable[int] | None = None) -> Counter[str]:
        """How many of its sessions, all or those with these indices, are of which rule.

        Of what makes no sense, none are: it is for counting.
        """
        chosen = self.sessions if places is None else [self.sessions[i] for i in places]
        try:
            content = self.read_content()
            terms, parcels = content["terms"], content["sessions"]
            return Counter(str(terms[parcels[at]["terms"]]["name"]) for at, _ in chosen)  # type: ignore[index]
        except (ValueError, TypeError, LookupError, RecursionError):
            return Counter()

    @classmethod
    def rules_of_truncated(cls, received: Received) -> Counter[str]:
        """How many sessions of which rule are in a message of which not all descriptors have come.

        Of some none are, if not even the second has. All descriptors are closed.
        """
        try:
            for fd in received.fds[2:]:  # first, as others are needed to read
                os.close(fd)
            del received.fds[2:]
            sessions: list[tuple[int, list[int]]] = [
                (it, []) for it, _ in _places(received.message)
            ]
            content = received.fds[1] if len(received.fds) == 2 else -1
            return cls(0, content=content, sessions=sessions).rules()
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError("not a consignment") from err
        finally:
            received.close()

    def only(self, refused: Collection[int]) -> Consignment:
        """What is left for another taker, or its giver: those with these indices.

        Closes this one, unless it is itself what is left. Raises OSError, with this one closed and
        those sessions reset.
        """
        if len(refused) >= len(self.sessions):
            return self
        rest = Consignment(self.number, version=self.version, is_foreign=self.is_foreign)
        rest.sessions = [self.sessions[i] for i in sorted({*refused})]
        self.sessions = [one for i, one in enumerate(self.sessions) if i not in refused]
        rest.content, self.content = self.content, -1
        self.close()
        try:
            rest.token = claim.make()
        except OSError:
            rest.abort()
            raise
        return rest

    def abort(self) -> None:
        """Nobody goes on with these sessions: reset them, as no cut stream may look whole."""
        for _, fds in self.sessions:
            for fd in fds:
                with suppress(OSError):  # not a socket
                    sock = socket.socket(fileno=fd)
                    if sock.type is socket.SOCK_STREAM:
                        set_abort_on_close(sock)
                    sock.detach()
        self.close()

    def close(self) -> None:
        """Close all its descriptors: others have them, or the sessions have ended."""
        for _, fds in self.sessions:
            while fds:
                os.close(fds.pop())
        self.sessions.clear()
        for fd in (self.token, self.content):
            if fd >= 0:
                os.close(fd)
        self.token = self.content = -1


def ask(channel: Channel, number: int, limit: int, choice: Mapping[str, object]) -> None:
    """Ask for up to ``limit`` sessions, of those that meet a choice. Raises ChannelClosed."""
    channel.send(move(number, limit, choice))


def move(number: int, limit: int, choice: Mapping[str, object]) -> Message:
    """The same as a message, for a giver that has no channel to us."""
    return {**choice, "op": Op.MOVE, "number": number, "limit": limit}


def answer_taken(
    channel: Channel, number: int, refused: Sequence[int] = (), why: Refusal = Refusal.NONE
) -> None:
    """Say that a consignment is taken, but for those with these indices. Raises ChannelClosed."""
    channel.send({"op": Op.TAKEN, "number": number, "refused": [*refused], "why": why})


def read_taken(message: Message) -> tuple[int, list[int], str]:
    """Number, indices of what was refused, and why. Raises ValueError for nonsense."""
    refused, why = message.get("refused"), message.get("why")
    if not (isinstance(refused, list) and isinstance(why, str)):
        raise ValueError("not an answer to a consignment")  # noqa: TRY004 - as all nonsense
    return _count(message.get("number")), [_count(index) for index in refused], why


def confirm(
    channel: Channel, number: int, *, is_back: bool = False, refused: Sequence[int] = ()
) -> None:
    """Tell a giver that a consignment is settled; ``is_back``: that it should take it back.

    ``refused``: the indices of those that it should go on with. Raises ChannelClosed.
    """
    channel.send(moved(number, is_back=is_back, refused=refused))


def moved(number: int, *, is_back: bool = False, refused: Sequence[int] = ()) -> Message:
    """The same as a message, for a giver that has no channel to us."""
    return {"op": Op.MOVED, "number": number, "is_back": is_back, "refused": [*refused]}


def _places(message: Message) -> list[tuple[int, int]]:
    """Where in the content each session is described, and how many descriptors it has.

    Raises KeyError, TypeError or ValueError for nonsense.
    """
    shares = message["sessions"]
    if not isinstance(shares, list) or len(shares) > MAX_SESSIONS:
        raise ValueError("not a consignment")
    return [(_count(place), _count(count)) for place, count in shares]


def _count(value: object) -> int:
    """A number that is not negative, nor too long to be sent on. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("not a number")
    return value
