"""What an instance serves: the configuration in force, its generation, and the sockets it needs.

A new generation is all or nothing. Sockets of addresses that no rule has any more are closed in two
steps: *closing*, no new handshakes but everything under way is still served, until a time; then
*dropped*, which the workers are told, and closed when all of them have let go.

Starts no process and speaks to no worker; the master does.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import time
from typing import TYPE_CHECKING, Final

from forwarder.config.plan import diff
from forwarder.errors import StartupError
from forwarder.fleet import Serving
from forwarder.listeners import (
    CLOSE_GRACE_S,
    ListenerTable,
    address_of,
    bind_addresses,
    start_lock,
)
from forwarder.status import describe_rule
from forwarder.upstream.names import unresolved_names

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping

    from forwarder.config.model import Config, Rule
    from forwarder.listeners import BindAddress
    from forwarder.reload import Candidate

log = logging.getLogger(__name__)

# What is read once, by a process that is not started again by a reload.
# Of master and worker each, besides listening sockets: channels, epoll, loop, log, pipes, and room
# for a few sessions. Arbitrary, above the 16 that an idle worker has.
RESERVED_DESCRIPTORS: Final = 24
_FIXED_SETTINGS: Final = ("relay", "user", "group", "pid_file", "control")


class Service:
    """The generation in force. Owns the listening sockets, through ``table``."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.generation = 1
        self.table = ListenerTable()
        self._binds: dict[str, tuple[BindAddress, ...]] = {}
        self._revision = 0
        self._closing: dict[BindAddress, tuple[Rule, float]] = {}
        self._dropped: set[BindAddress] = set()

    def open(
        self, inherited: Callable[[Callable[[socket.socket], bool]], Iterable[socket.socket]]
    ) -> None:
        """Make or take over the sockets of the first configuration: all, or none.

        ``inherited`` gives sockets that exist already; it is told which are wanted. Blocks while
        names are resolved. Raises StartupError.
        """
        self._binds = bind_addresses(self.config)
        for issue in unresolved_names(self.config):
            # No reason to refuse the other rules; the workers ask again when a client comes.
            log.warning("%s", issue)
        wanted = self._rules_by_address()
        _check_descriptors(len(wanted), self.config.settings.workers)
        self.table.inherit(inherited(lambda sock: address_of(sock) in wanted))
        with start_lock():
            self.table.add(wanted, self.config.settings.workers)
        for address in self.table.unclaimed():
            log.warning("master: no rule listens on %s, inherited; closed", address.target)

    def grow(self, slots: int) -> None:
        """Have sockets for ``slots`` workers. Raises StartupError; what was made is kept unused."""
        self.table.grow(self._rules_by_address(), slots)

    def begin(self, candidate: Candidate, slots: int) -> str:
        """Put a candidate in force for ``slots`` workers. Returns what it changes, for people.

        Raises StartupError if something cannot be bound; then nothing has changed.
        """
        old, new = self.config, candidate.config
        before = self._rules_by_address()
        wanted = _by_address(new, candidate.binds)
        added = [address for address in wanted if address not in self.table]
        try:
            self.table.add(wanted, slots)
            self.table.grow(wanted, slots)
        except BaseException:
            self.table.close(added)
            raise
        self.generation += 1
        self.config, self._binds = new, candidate.binds
        for address in wanted:
            self.table.accept_handshakes(address)  # it may have been about to be closed
            self._closing.pop(address, None)
            self._dropped.discard(address)
        until = time.monotonic() + CLOSE_GRACE_S
        ports = {address.target.sockaddr[1] for address in wanted}
        for address in before.keys() - wanted.keys():
            # A port that is still served, by a wildcard or a single address, must not lose SYNs.
            if address.target.sockaddr[1] not in ports:
                self.table.refuse_handshakes(address)
            self._closing[address] = (before[address], until)
        for setting in _FIXED_SETTINGS:
            if getattr(old.settings, setting) != getattr(new.settings, setting):
                log.warning("reload: a change of %s takes effect at the next start", setting)
        return f"{diff(old, new)}, generation {self.generation}"

    def serving(self) -> Serving:
        """What the workers shall serve now: the configuration, and what is being closed."""
        binds = dict(self._binds)
        rules = list(self.config.rules)
        for address, (rule, _) in self._closing.items():
            name = f"{rule.name} at {address.target}, closing"
            rules.append(dataclasses.replace(rule, name=name))
            binds[name] = (address,)
        self._revision += 1
        return Serving(
            revision=self._revision,
            generation=self.generation,
            config=dataclasses.replace(self.config, rules=tuple(rules)),
            binds=binds,
        )

    def deadlines(self) -> list[float]:
        """When :meth:`expire` has something to do."""
        return [until for _, until in self._closing.values()]

    def expire(self, now: float) -> bool:
        """Drop what has been closing long enough. Returns whether the workers must be told."""
        over = [address for address, (_, until) in self._closing.items() if now >= until]
        for address in over:
            del self._closing[address]
        self._dropped.update(over)
        return bool(over)

    def close_dropped(self) -> None:
        """Close what was dropped; all workers have let go of it."""
        self.table.close(self._dropped)
        self._dropped.clear()

    def describe_rules(self, counters: Mapping[str, dict[str, int]]) -> list[dict[str, object]]:
        """All rules with where they listen and their counters; as in the status."""
        return [
            describe_rule(
                rule,
                [str(address.target) for address in self._binds[rule.name]],
                counters[rule.name],
            )
            for rule in self.config.rules
        ]

    def _rules_by_address(self) -> dict[BindAddress, Rule]:
        return _by_address(self.config, self._binds)


def _check_descriptors(addresses: int, workers: int) -> None:
    """Refuse a start that could never serve, before anything is bound."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The master has all sockets. A worker that adopts those of all others has them all, too.
    needed = addresses * workers + RESERVED_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise StartupError(
            f"{addresses} addresses for {workers} workers need at least {needed} file descriptors "
            f"and 2 for each session, the limit is {limit}; "
            "hint: raise the limit of open files (LimitNOFILE=, ulimit -n), or have fewer workers"
        )


def _by_address(
    config: Config, binds: Mapping[str, tuple[BindAddress, ...]]
) -> dict[BindAddress, Rule]:
    return {address: rule for rule in config.rules for address in binds[rule.name]}
