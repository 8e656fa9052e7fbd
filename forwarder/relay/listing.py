"""Which sessions are open, for people: choosing some of them and describing each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forwarder.access import pattern_matcher
from forwarder.net.sockets import client_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from forwarder.relay.conversation import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Sessions of which each condition holds that is not None.

    ``ids`` are those of :func:`identify`, ``client`` is an access pattern, ``rule`` a name.
    """

    ids: frozenset[str] | None = None
    rule: str | None = None
    client: str | None = None

    @classmethod
    def read(cls, message: Mapping[str, object]) -> Choice:
        """The choice in a message of the master, which has checked it."""
        ids, rule, client = (message.get(key) for key in ("ids", "rule", "client"))
        return cls(
            ids=frozenset(map(str, ids)) if isinstance(ids, list) else None,
            rule=rule if isinstance(rule, str) else None,
            client=client if isinstance(client, str) else None,
        )

    def of(self, sessions: Iterable[Conversation]) -> Iterator[Conversation]:
        """Those that are chosen. Raises PatternError for a pattern that is none."""
        is_client = pattern_matcher(self.client) if self.client is not None else None
        for session in sessions:
            if self.ids is not None and identify(session) not in self.ids:
                continue
            if self.rule is not None and session.pool.rule.name != self.rule:
                continue
            address = session.client_address
            # Clients of unix sockets have no address that a pattern could match.
            if is_client is None or (isinstance(address, tuple) and is_client(address[0])):
                yield session


def identify(session: Conversation) -> str:
    """What a session is called: unique on this machine while its worker lives."""
    return f"{session.relay.pid}.{session.id}"


def describe(session: Conversation, now: float) -> dict[str, object]:
    """One session, as in the answer to ``forwarder sessions``."""
    return {
        "id": identify(session),
        "rule": session.pool.rule.name,
        "client": client_text(session.client_address),
        "upstream": str(session.target) if session.target else None,
        "state": session.state.value,
        "bytes_c2u": session.c2u.moved,
        "bytes_u2c": session.u2c.moved,
        "age_s": round(now - session.started_at, 1),
        "idle_s": round(now - session.active_at, 1),
    }
