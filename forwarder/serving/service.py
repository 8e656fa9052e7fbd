"""What an instance serves: the configuration in force, its generation, and the sockets it needs.

A new generation is all or nothing. Sockets of addresses that no rule has any more are closed in two
steps: *closing*, no new handshakes but everything under way is still served, until a time; then
*dropped*, which the workers learn, and closed when all of them have let go.

Starts no process and sends nothing to workers; the master does.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING, Final

from forwarder.config.address import UnixAddress
from forwarder.config.describe import listening, waiting_text
from forwarder.config.plan import FIXED_SETTINGS, diff
from forwarder.serving.binding import Binding, check_descriptors
from forwarder.serving.firstanswers import FirstAnswers
from forwarder.serving.generation import Serving
from forwarder.serving.listeners import CLOSE_GRACE_S, ListenerTable
from forwarder.serving.loader import Candidate, Rejected, as_known
from forwarder.serving.startlock import start_lock
from forwarder.upstream.members import effective
from forwarder.upstream.wanted import listening_names

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from forwarder.config.model import Config, Rule, Upstream
    from forwarder.net.sockets import Target
    from forwarder.serving.addresses import BindAddress
    from forwarder.serving.binding import Had
    from forwarder.serving.retries import Waiting
    from forwarder.upstream.answers import Answer

log = logging.getLogger(__name__)

# The same for sockets that were set aside and take no SYNs from others: the answer to a SYN may get
# lost twice, and is sent again after 1 and 3 s (tcp(7)).
ASIDE_GRACE_S: Final = 3.5
# The same if SYNs are lost at them: handshakes that have begun end, and a client that loses its SYN
# now finds them closed when it sends the SYN again, after 1 s.
GROUPED_GRACE_S: Final = 0.5
# How long a rule that an upgrade has dropped can get its sockets back: until the predecessor, which
# serves them, has closed them for certain.
UNCLAIMED_S: Final = 2 * CLOSE_GRACE_S


class Service:
    """The generation in force. Owns the listening sockets, through ``table``."""

    def __init__(
        self,
        config: Config,
        on_changed: Callable[[], None],
        known: Callable[[], Mapping[str, Answer]] = dict,
    ) -> None:
        """``on_changed`` is called when :meth:`turn` has changed what the workers serve.

        ``known`` gives what is known of names now.
        """
        self.config = config
        self.generation = 1
        self.table = ListenerTable()
        self._start = FirstAnswers()
        self._binding = Binding(self.table, self._start)
        self.retries = self._binding.retries
        self._revision = 0
        self._closing: dict[BindAddress, tuple[Rule, float]] = {}
        self._dropped: set[BindAddress] = set()
        self._unclaimed_until = math.inf
        self._on_changed = on_changed
        self._known = known
        # What is served in place of upstreams that are several servers, by these as written.
        self._effective: dict[tuple[Upstream, ...], tuple[Upstream, ...]] = {}

    def open(
        self,
        inherited: Callable[[Callable[[Iterable[str]], bool]], Iterable[socket.socket]],
        known: Mapping[str, Answer],
    ) -> None:
        """Make or take over the sockets of the first configuration: all, or none.

        Rules that may wait for their address do, and those on names that are not ``known``.
        ``inherited`` gives sockets that exist already, by a test for places of which one is
        wanted. Raises StartupError.
        """
        names = [rule.name for rule in self.config.rules if not rule.listen.is_literal]
        candidate = as_known(self.config, known, patient=names)
        self._start.expect(self.config.rules, known, time.monotonic())
        wanted = _by_address(self.config, candidate.binds)
        slots = self.config.settings.workers
        needed = len(wanted) * slots
        check_descriptors(needed, slots, f"{len(wanted)} addresses for {slots} workers")
        places = {address.place for address in wanted}
        self.table.inherit(inherited(lambda others: not places.isdisjoint(others)))
        with start_lock():
            had = self._binding.require(candidate, slots, lambda _: False)
            at_once = [rule for rule in self.config.rules if rule.name not in self._start.rules]
            self._put_in_force(candidate, had, slots)
        for line in listening(at_once, self._binding.state_of):
            log.info("%s", line)
        for address in self.table.unclaimed():
            if address.aside:  # its giver knows
                continue
            log.warning("master: no rule listens on %s, inherited; closed", address.target)

    def grow(self, slots: int) -> None:
        """Make sockets for ``slots`` workers. Raises StartupError; made ones are kept unused."""
        wanted = self._rules_by_address()
        needed = self.table.count(wanted, slots)
        check_descriptors(needed, slots, f"{len(wanted)} addresses for {slots} workers")
        self.table.grow(wanted, slots)

    def candidate(self) -> Candidate:
        """What is in force, to be put in force again if the next generation fails."""
        binds = {rule.name: self._binding.of(rule.name) for rule in self.config.rules}
        waiting = {name: self.retries.get(name) for name in binds if not binds[name]}
        why = {name: how.why for name, how in waiting.items() if how is not None}
        return Candidate(self.config, binds, why)

    def adopt(self, candidate: Candidate, slots: int) -> str:
        """Put a candidate in force for ``slots`` workers. Returns what it changes, for people.

        Raises StartupError if something cannot be bound; then nothing has changed.
        """
        candidate = self._with_what_is_bound(candidate)
        old, new = self.config, candidate.config
        before = self._rules_by_address()
        every = _by_address(new, candidate.binds)
        needed = self.table.count(every, slots)
        check_descriptors(needed, slots, f"{len(every)} addresses for {slots} workers")
        added = [address for address in every if address not in self.table]
        listens = {rule.name: rule.listen for rule in old.rules}
        kept_names = {r.name for r in new.rules if listens.get(r.name) == r.listen}

        def may_wait(rule: Rule) -> bool:
            """A rule that waits already is no reason to refuse a new configuration."""
            return rule.name in kept_names and self.retries.get(rule.name) is not None

        try:
            had = self._binding.require(candidate, slots, may_wait)
            kept = {address: rule for address, rule in every.items() if address in self.table}
            self.table.grow(kept, slots)
        except BaseException:
            self.table.close(added)
            raise
        self.generation += 1
        self.retries.keep(kept_names)
        self._put_in_force(candidate, had, slots)
        wanted = self._rules_by_address()
        self._begin_closing(before, wanted)
        self.table.set_modes(wanted)
        for setting in FIXED_SETTINGS:
            if getattr(old.settings, setting) != getattr(new.settings, setting):
                log.warning("reload: a change of %s takes effect at the next start", setting)
        return f"{diff(old, new)}, generation {self.generation}{waiting_text(self.waiting)}"

    def _with_what_is_bound(self, candidate: Candidate) -> Candidate:
        """The candidate, whose unchanged rules keep their addresses if their name has none."""
        before = {rule.name: rule for rule in self.config.rules}
        kept = {
            rule.name: self._binding.of(rule.name)
            for rule in candidate.config.rules
            if rule.name in candidate.unresolved
            and rule.name in before
            and _listens_alike(rule, before[rule.name])
            and self._binding.of(rule.name)
        }
        unresolved = {k: why for k, why in candidate.unresolved.items() if k not in kept}
        return dataclasses.replace(candidate, binds=candidate.binds | kept, unresolved=unresolved)

    def _put_in_force(self, candidate: Candidate, had: Mapping[str, Had], slots: int) -> None:
        self.config = candidate.config
        self._binding.put_in_force(candidate, had, slots)
        for address in self._rules_by_address():
            self._reopen(address)

    def _reopen(self, address: BindAddress) -> None:
        """An address that was about to be closed, if it was, stays."""
        self.table.accept_handshakes(address)
        self._closing.pop(address, None)
        self._dropped.discard(address)

    def _begin_closing(
        self, before: Mapping[BindAddress, Rule], wanted: Mapping[BindAddress, Rule]
    ) -> None:
        now = time.monotonic()
        ports = {address.port for address in wanted}
        for address in before.keys() - wanted.keys():
            # A port that is still served, by a wildcard or a single address, must not lose SYNs.
            closing = self.table.turn_away(address, is_served=address.port in ports)
            until = now + self._grace_s(closing)
            # UDP has no handshakes: a client that comes now has not begun before.
            self._closing[closing] = (before[address], 0.0 if address.is_udp else until)

    def _grace_s(self, closing: BindAddress) -> float:
        if not closing.aside:
            return CLOSE_GRACE_S
        return GROUPED_GRACE_S if self.table.is_in_the_way(closing) else ASIDE_GRACE_S

    @property
    def has_dropped_some(self) -> bool:
        """Whether we have inherited sockets that no rule has."""
        return bool(self.table.unclaimed())

    def own(self, *, has_predecessor: bool) -> None:
        """No other process serves our inherited sockets, or only for a while.

        ``has_predecessor``: it serves the sockets that no rule has, for as long as handshakes may
        be under way; a rule that comes back within that time gets them back.
        """
        if has_predecessor:
            self.table.refuse_unclaimed()
            self._unclaimed_until = time.monotonic() + UNCLAIMED_S
        else:
            self.table.close_unclaimed()
        self.table.own(self._rules_by_address())

    # -- rules that wait for their address

    @property
    def awaited(self) -> set[str]:
        """Rules without whose address the start fails, as long as that is open."""
        return {
            rule.name
            for rule in self.config.rules
            if rule.name in self._start.rules and not rule.retries_bind
        }

    @property
    def is_started(self) -> bool:
        """Whether each name to listen on has been looked up, or that has taken too long."""
        return not self._start.rules

    def on_answers(self, hosts: Collection[str]) -> None:
        """Names have been looked up: try again the rules that wait for them."""
        self._start.on_answers(hosts)
        if not len(self.retries):
            return
        names = listening_names(self.config.rules)
        waiting = [rule for host in hosts for rule in names.get(host, ())]
        self.retries.hasten(waiting, time.monotonic())

    def due(self, now: float) -> Config:
        """The configuration in force, with no other rules than those to try again now."""
        names = self.retries.due(now)
        rules = tuple(rule for rule in self.config.rules if rule.name in names)
        return dataclasses.replace(self.config, rules=rules)

    def bind_late(self, found: Candidate | Rejected, tried: Config, slots: int) -> bool:
        """Bind what could not be bound before, as far as possible now. True if something was.

        ``found`` is where the rules of ``tried`` listen. Raises StartupError, as ``Binding`` does.
        """
        is_more = self._binding.bind_late(found, tried, self.config, slots)
        for rule in tried.rules:
            for address in self._binding.of(rule.name):
                self._reopen(address)
        return is_more

    @property
    def waiting(self) -> list[str]:
        """Rules that wait for some of their addresses; a reload is not refused because of these."""
        return [rule.name for rule in self.config.rules if self.retries.get(rule.name)]

    @property
    def can_go_deaf(self) -> bool:
        """Whether there are addresses that can go without our doing."""
        return self._binding.can_go_deaf

    def look_around(self, now: float) -> bool:
        """Give up what no client can reach any more. Returns whether the workers have to know."""
        gone = self._binding.give_up_deaf(now)
        self._dropped.update(gone)
        return bool(gone)

    # -- what the workers serve

    def serving(self) -> Serving:
        """What the workers have to serve now: the configuration, and what is being closed.

        Where names stand for several servers, these are in their place as far as they are known.
        """
        binds = {rule.name: self._binding.of(rule.name) for rule in self.config.rules}
        counted_as: dict[str, str] = {}
        rules = list(self.config.rules)
        closing: dict[int, list[BindAddress]] = {}
        for address, (rule, _) in self._closing.items():
            closing.setdefault(id(rule), []).append(address)
        for addresses in closing.values():
            rule, _ = self._closing[addresses[0]]
            name = f"{rule.name} at {addresses[0].target}, closing"
            while name in binds:
                name += "'"
            rules.append(dataclasses.replace(rule, name=name))
            binds[name] = tuple(addresses)
            counted_as[name] = rule.name
        self._put_members(rules)
        self._revision += 1
        return Serving(
            revision=self._revision,
            generation=self.generation,
            config=dataclasses.replace(self.config, rules=tuple(rules)),
            binds=binds,
            counted_as=counted_as,
        )

    def _put_members(self, rules: list[Rule]) -> None:
        """Put servers in place of the names that stand for them."""
        self._effective.clear()
        for index, rule in enumerate(rules):
            if not rule.has_members:
                continue
            found = self._effective.get(rule.upstreams)
            if found is None:
                found = effective(rule.upstreams, self._known())
                self._effective[rule.upstreams] = found
            rules[index] = dataclasses.replace(rule, upstreams=found)

    def has_other_members(self) -> bool:
        """Whether :meth:`serving` would have other servers than the last time."""
        known = self._known()
        served = self._effective.items()
        return any(effective(written, known) != found for written, found in served)

    @property
    def deadline(self) -> float:
        """When :meth:`turn` has something to do; infinite for never."""
        closing = (until for _, until in self._closing.values())
        return min(self._unclaimed_until, self._start.deadline, *closing)

    def turn(self, now: float) -> None:
        """Drop what has been closing long enough, and stop waiting for names without an answer."""
        self._start.expire(now)
        if now >= self._unclaimed_until:
            self.table.close_unclaimed()
            self._unclaimed_until = math.inf
        over = [address for address, (_, until) in self._closing.items() if now >= until]
        for address in over:
            del self._closing[address]
        # All slots share a unix socket. Ours is not needed for queued clients: the first worker
        # that hears of the change accepts them, and clients that come from now on are refused.
        self.table.close(address for address in over if address.target.is_unix)
        self._dropped.update(address for address in over if not address.target.is_unix)
        if over:
            self._on_changed()

    def cancel(self) -> None:
        """The workers get nothing more: wait for nothing. The sockets stay."""
        self._closing.clear()
        self._unclaimed_until = math.inf
        self._start.expire(math.inf)

    def close(self) -> None:
        """Close our copies of the sockets, and remove the files of those that are still ours."""
        self.table.release()
        self.table.remove_files()

    def close_dropped(self) -> None:
        """Close what was dropped; all workers have let go of it."""
        self.table.close(self._dropped)
        self._dropped.clear()

    def describe_rules(
        self, counters: Callable[[str], Mapping[str, object]], now: float
    ) -> list[dict[str, object]]:
        """All rules with where they listen, and their counters by name; as in the status."""
        return [
            rule_status(
                rule,
                [str(target) for target in _first_ports(rule, self._binding.of(rule.name))],
                {**counters(rule.name), "queue": self.table.queue(self._binding.of(rule.name))},
                self.retries.get(rule.name),
                now,
            )
            for rule in self.config.rules
        ]

    def _rules_by_address(self) -> dict[BindAddress, Rule]:
        return self._binding.by_address(self.config.rules)


def _by_address(
    config: Config, binds: Mapping[str, tuple[BindAddress, ...]]
) -> dict[BindAddress, Rule]:
    return {address: rule for rule in config.rules for address in binds[rule.name]}


def _listens_alike(one: Rule, other: Rule) -> bool:
    return (one.listen, one.protocol.listens_on_udp, one.options.mptcp.on_listen) == (
        other.listen,
        other.protocol.listens_on_udp,
        other.options.mptcp.on_listen,
    )


def _first_ports(rule: Rule, addresses: Iterable[BindAddress]) -> list[Target | str]:
    """Where a rule listens, for people: a range of ports once for each address of its host."""
    listen = rule.listen
    if isinstance(listen, UnixAddress) or listen.ports == 1:
        return [address.target for address in addresses]
    first = [address.target for address in addresses if address.target.port == listen.port]
    return [f"{target}-{listen.last_port}" for target in first]


def rule_status(
    rule: Rule,
    addresses: Sequence[str],
    counters: Mapping[str, object],
    waiting: Waiting | None,
    now: float,
) -> dict[str, object]:
    """One rule, as in the JSON of the status; ``waiting`` if it has not all of its addresses."""
    state: dict[str, object] = {"state": "listening"}
    if waiting is not None:
        state = {
            "state": "partial" if addresses else "waiting",
            "why": waiting.why,
            "attempts": waiting.failures,
            "retry_in_s": round(max(0.0, waiting.not_before - now), 1),
        }
    return {
        "name": rule.name,
        "protocol": rule.protocol.value,
        "listen": str(rule.listen),
        **state,
        "addresses": list(addresses),
        "upstreams": [str(upstream) for upstream in rule.upstreams],
        **counters,
    }
