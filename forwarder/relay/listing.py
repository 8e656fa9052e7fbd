"""Which sessions are open, for people: choosing some of them and describing each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from forwarder.ipc.messages import Op
from forwarder.net.sockets import client_text
from forwarder.relay.access import pattern_matcher
from forwarder.relay.session import id_text
from forwarder.stats.reasons import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from forwarder.relay.relay import Relay
    from forwarder.relay.session import Session


# What a question to the workers has beside conditions.
_OF_A_QUESTION: Final = frozenset({"op", "number", "limit"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Sessions that meet each condition that is not None.

    ``ids`` are those of :func:`identify`, ``client`` is an access pattern, ``rule`` a name.
    ``group`` is the name of a group, ``server`` one of a server, as configured.
    """

    ids: frozenset[str] | None = None
    rule: str | None = None
    client: str | None = None
    group: str | None = None
    server: str | None = None

    @classmethod
    def read(cls, message: Mapping[str, object]) -> Choice:
        """The choice in a message of the master, which has checked it.

        Nothing is chosen by a condition that only newer code knows: the successor may be that, and
        must not end more than was meant.
        """
        ids = message.get("ids")
        given = {key for key, value in message.items() if value is not None}
        if given - _OF_A_QUESTION - set(cls.__dataclass_fields__):
            return cls(ids=frozenset())
        texts = {key: message.get(key) for key in ("rule", "client", "group", "server")}
        return cls(
            ids=frozenset(map(str, ids)) if isinstance(ids, list) else None,
            **{key: text for key, text in texts.items() if isinstance(text, str)},
        )

    def of(self, sessions: Iterable[Session]) -> Iterator[Session]:
        """Those that are chosen. Raises PatternError for a pattern that is none."""
        is_client = pattern_matcher(self.client) if self.client is not None else None
        for session in sessions:
            if self.ids is not None and identify(session) not in self.ids:
                continue
            if self.rule is not None and session.pool.rule.name != self.rule:
                continue
            if self.group is not None and group_of(session) != self.group:
                continue
            if self.server is not None and server_of(session) != self.server:
                continue
            address = session.client_address
            # Clients of unix sockets have no address that a pattern could match.
            if is_client is None or (isinstance(address, tuple) and is_client(address[0])):
                yield session


def identify(session: Session) -> str:
    """The id of a session, which it has from its birth on, wherever it goes."""
    return id_text(session.id)


def group_of(session: Session) -> str | None:
    """The name of the group that a session has its server from; None if there was no choice."""
    return session.relay.servers.group_of(session)


def server_of(session: Session) -> str | None:
    """The server of a session, as configured; None if it has none, or none of a group."""
    return session.server.name if session.server is not None else None


def describe(session: Session, now: float) -> dict[str, object]:
    """One session, as in the answer to ``forwarder sessions``."""
    return {
        "id": identify(session),
        "rule": session.pool.rule.name,
        "client": client_text(session.client_address),
        "upstream": str(session.target) if session.target else None,
        "group": group_of(session),
        "server": server_of(session),
        "state": session.state.value,
        "bytes_c2u": session.c2u.moved,
        "bytes_u2c": session.u2c.moved,
        "age_s": round(now - session.started_at, 1),
        "idle_s": round(now - session.active_at, 1),
    }


def answer(question: Mapping[str, object], relay: Relay, now: float) -> object:
    """List or end the sessions that a question is about. Raises PatternError as :class:`Choice`."""
    chosen = Choice.read(question).of(relay.sessions)
    if question["op"] == Op.LIST:
        limit = question["limit"]
        assert isinstance(limit, int)  # noqa: S101 - our own master wrote it
        return [describe(session, now) for session in islice(chosen, limit)]
    doomed = tuple(chosen)
    relay.abort_sessions(Phase.KILL, "killed", doomed)
    return len(doomed)
