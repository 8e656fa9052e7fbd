"""Sessions whose client may not use their rule any more: access rules that have changed end them.

Who may begin a session a listener decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.relay.access import AccessList, Decision, access_of
from forwarder.stats.reasons import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from forwarder.config.model import AccessRule, Config, Rule
    from forwarder.relay.relay import Relay
    from forwarder.relay.session import Session


class Denials:
    """What access rules mean for the open sessions of a worker, if they are to mean something."""

    __slots__ = ("_access_of", "_by_rule", "_relay")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        # The access lists of rules, by name, and how others are made; None: they end nothing.
        self._by_rule: dict[str, AccessList] = {}
        self._access_of: Callable[[Rule], AccessList] | None = None

    def apply(self, config: Config, accesses: Sequence[AccessList]) -> None:
        """These are the access lists of the rules of ``config``, in their order, from now on.

        Removed rules are judged by their own access rules and the global ones of now.
        """
        names = (rule.name for rule in config.rules)
        self._by_rule = dict(zip(names, accesses, strict=True))
        self._access_of = None
        if config.settings.cut_denied:
            self._access_of = lambda rule: access_of(config, rule)
        self.look()

    def look(self) -> None:
        """End sessions that are denied: rules have changed, or sessions have come."""
        if self._access_of is not None:
            self._end(self._by_rule, self._access_of)

    def heed(
        self, everywhere: Sequence[AccessRule], rules: Mapping[str, Sequence[AccessRule]]
    ) -> None:
        """End sessions that are denied by the access rules of an heir.

        ``everywhere`` holds for all rules, ``rules`` are those of each rule.
        """
        by_rule = {name: AccessList.compile(everywhere, own) for name, own in rules.items()}
        self._end(by_rule, lambda rule: AccessList.compile(everywhere, rule.access))

    def _end(self, by_rule: dict[str, AccessList], access_of: Callable[[Rule], AccessList]) -> None:
        denied = _denied(self._relay.sessions, by_rule, access_of)
        self._relay.abort_sessions(Phase.ACCESS, "not allowed any more", denied)


def _denied(
    sessions: Iterable[Session],
    by_rule: dict[str, AccessList],
    access_of: Callable[[Rule], AccessList],
) -> list[Session]:
    decisions: dict[tuple[str, str], Decision] = {}
    denied = []
    for session in sessions:
        rule, address = session.pool.rule, session.client_address
        if not isinstance(address, tuple):
            continue  # a unix socket, whose clients have no address to judge them by
        key = (rule.name, address[0])
        if key not in decisions:
            if rule.name not in by_rule:
                by_rule[rule.name] = access_of(rule)
            decisions[key] = by_rule[rule.name].decide(address[0])
        if decisions[key] is not Decision.ALLOWED:
            denied.append(session)
    return denied
