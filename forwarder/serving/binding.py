"""Where rules listen: which of their addresses are bound, and which they wait for.

A host name may stand for several addresses: a rule listens on those that can be bound, and waits
for the others. A rule without any keeps everything from starting, or waits if it may. Addresses at
which no client can reach us any more, because their interface or their file has gone, are given up
and waited for, too.
"""

from __future__ import annotations

import logging
import resource
import time
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address, UnixAddress
from forwarder.config.describe import listening
from forwarder.errors import StartupError
from forwarder.serving.addresses import BindError
from forwarder.serving.loader import Candidate, Rejected
from forwarder.serving.retries import Retries
from forwarder.serving.startlock import START_LOCK_S, start_lock
from forwarder.system.printable import field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from forwarder.config.model import Config, Rule
    from forwarder.serving.addresses import BindAddress
    from forwarder.serving.firstanswers import FirstAnswers
    from forwarder.serving.listeners import ListenerTable

log = logging.getLogger(__name__)

# Of master and worker each, besides listening sockets: epoll, loop, log, pipes, and room for a few
# sessions. Arbitrary, above the 16 that an idle worker has.
RESERVED_DESCRIPTORS: Final = 24
# Of the master, for each worker: the channel to it, and its board.
DESCRIPTORS_OF_A_WORKER: Final = 2


@dataclass(frozen=True, slots=True)
class Had:
    """The addresses of a rule that are bound; of the others, the error of the first one."""

    addresses: tuple[BindAddress, ...]
    why: str = ""
    error: StartupError | None = None


class Binding:
    """Which addresses of the rules are bound. Rules that wait for some are in ``retries``."""

    def __init__(self, table: ListenerTable, start: FirstAnswers) -> None:
        """``start`` are rules that a start waits for."""
        self.retries = Retries()
        self._table = table
        self._start = start
        self._had: dict[str, tuple[BindAddress, ...]] = {}
        self._fragile: list[Rule] = []  # that can go deaf
        self._locked_since: float | None = None  # when another process first held the start lock

    def of(self, name: str) -> tuple[BindAddress, ...]:
        """Where a rule listens."""
        return self._had.get(name, ())

    def by_address(self, rules: Iterable[Rule]) -> dict[BindAddress, Rule]:
        """Which rule listens where."""
        return {address: rule for rule in rules for address in self.of(rule.name)}

    # -- a generation

    def require(
        self, candidate: Candidate, slots: int, may_wait: Callable[[Rule], bool]
    ) -> dict[str, Had]:
        """Bind all rules of a candidate, except those that may come later, or none.

        Returns what each rule has, for :meth:`put_in_force`. Raises StartupError.
        """
        found: dict[str, Had] = {}
        added: list[BindAddress] = []
        try:
            for rule in candidate.config.rules:
                if rule.retries_bind or rule.name in candidate.unresolved:
                    continue
                wanted = candidate.binds[rule.name]
                added += [address for address in wanted if address not in self._table]
                had = found[rule.name] = self._bind(rule, candidate, slots, {})
                if not (had.addresses or may_wait(rule)):
                    raise had.error or BindError(rule, had.why, "")  # noqa: TRY301 - undone below
        except BaseException:
            self._table.close(added)
            raise
        return found

    def put_in_force(self, candidate: Candidate, found: Mapping[str, Had], slots: int) -> None:
        """Use what :meth:`require` has bound, and bind of the other rules what is possible."""
        self._had = {name: had.addresses for name, had in found.items()}
        self._fragile = [rule for rule in candidate.config.rules if _can_go_deaf(rule)]
        taken = {a: rule for rule in candidate.config.rules for a in self.of(rule.name)}
        for rule in candidate.config.rules:
            had = found.get(rule.name)
            if had is None:
                had = self._bind_if_possible(rule, candidate, slots, taken)
                taken |= dict.fromkeys(had.addresses, rule)
            self._note(rule, had)

    # -- later

    def bind_late(
        self, found: Candidate | Rejected, tried: Config, in_force: Config, slots: int
    ) -> bool:
        """Bind what could not be bound before, as far as possible now. True if something was.

        ``found`` is where the rules of ``tried``, some of those in force, listen. Raises
        StartupError for a rule without which the start has failed.
        """
        if isinstance(found, Rejected):
            why = "; ".join(found.problems)
            found = Candidate(tried, {}, {rule.name: why for rule in tried.rules})
        before = dict(self._had)
        taken = self.by_address(in_force.rules)
        with start_lock(patience_s=0.0) as is_ours:
            may_probe = self._may_probe(time.monotonic(), is_alone=is_ours)
            for rule in tried.rules:
                now = self.of(rule.name)
                had = Had((), "another instance is starting")  # our probe could meet it
                if may_probe:
                    had = self._bind_if_possible(rule, found, slots, taken)
                    taken |= dict.fromkeys(had.addresses, rule)
                more = tuple(address for address in had.addresses if address not in now)
                self._note(rule, Had(now + more, had.why))
        return self._had != before

    def _may_probe(self, now: float, *, is_alone: bool) -> bool:
        """Whether to go on; a process that holds the start lock for too long is ignored.

        Any process of this host can hold it: START_LOCK_S is how long a start waits.
        """
        if is_alone:
            self._locked_since = None
            return True
        if self._locked_since is None:
            self._locked_since = now
        return now >= self._locked_since + START_LOCK_S

    @property
    def can_go_deaf(self) -> bool:
        """Whether some rule is bound to an interface, is in a group, or has a file."""
        return bool(self._fragile)

    def give_up_deaf(self, now: float) -> list[BindAddress]:
        """Give up addresses at which no client can reach us, and let them be tried again at once.

        Returns the addresses under which the sockets are found that the workers still have.
        """
        gone: list[BindAddress] = []
        for rule in self._fragile:
            interface = interface_of(rule)
            for address in self.of(rule.name):
                why = self._table.why_deaf(address, interface)
                if why:
                    gone.append(self._table.set_aside(address))
                    self._had[rule.name] = tuple(a for a in self.of(rule.name) if a != address)
                    if self.retries.on_failure(rule.name, why, now):
                        log.warning(
                            "bind.lost rule=%s %s; it is tried again", field(rule.name), why
                        )
                    self.retries.hasten([rule.name], now)
        return gone

    # -- one rule

    def _bind_if_possible(
        self, rule: Rule, candidate: Candidate, slots: int, taken: Mapping[BindAddress, Rule]
    ) -> Had:
        """As :meth:`_bind`; if impossible, why. Raises StartupError if the start fails by that."""
        wanted = candidate.binds.get(rule.name, ())
        added = [address for address in wanted if address not in self._table]
        is_required = rule.name in self._start.rules and not rule.retries_bind
        try:
            had = self._bind(rule, candidate, slots, taken)
            if is_required and had.error and not had.addresses:
                raise had.error
            return had  # noqa: TRY300 - raised errors are handled alike
        except StartupError as err:
            self._table.close(added)
            if is_required:
                raise
            return Had((), err.why if isinstance(err, BindError) else str(err))

    def _bind(
        self, rule: Rule, candidate: Candidate, slots: int, taken: Mapping[BindAddress, Rule]
    ) -> Had:
        """Bind the hosts of a rule that can be bound, each with all ports of the rule.

        Raises StartupError where the system is short of something.
        """
        why = candidate.unresolved.get(rule.name, "")
        if why:
            return Had((), why)
        had: list[BindAddress] = []
        problems: dict[str, StartupError] = {}
        for host in _by_host(candidate.binds.get(rule.name, ())):
            try:
                _check_taken(rule, host, taken)
                needed = self._table.count(host, slots)
                check_descriptors(needed, slots, f"{len(host)} addresses more")
                self._table.add(dict.fromkeys(host, rule), slots)
            except BindError as err:
                if err.is_shortage:
                    raise
                problems[err.why] = err
            else:
                had += map(self._table.known, host)
        first = next(iter(problems.values()), None)
        return Had(tuple(had), "; ".join(problems), first)

    def _note(self, rule: Rule, had: Had) -> None:
        """Remember what a rule has bound, and log what is new."""
        self._had[rule.name] = had.addresses
        is_first = rule.name in self._start.rules
        if is_first and had.why and not had.addresses and self._start.is_unanswered(rule):
            self.retries.expect(rule.name, had.why, time.monotonic())
            return
        self._start.rules.discard(rule.name)
        failures = 0
        if had.why:
            what = "it is tried again"
            if had.addresses:
                others = ", ".join(str(host[0].target) for host in _by_host(had.addresses))
                what = f"it listens on {others}; the rest is tried again"
            if self.retries.on_failure(rule.name, had.why, time.monotonic()):
                log.warning("bind.waiting rule=%s %s; %s", field(rule.name), had.why, what)
        else:
            failures = self.retries.on_success(rule.name)
        if failures:
            log.info("bind.done rule=%s listens, at attempt %d", field(rule.name), failures + 1)
        elif is_first and had.addresses:
            log.info("%s", listening([rule], self.state_of)[0])

    def state_of(self, rule: Rule) -> str:
        """A word for the log."""
        if self.retries.get(rule.name) is None:
            return "listening"
        return "partly listening" if self.of(rule.name) else "waiting"


def interface_of(rule: Rule) -> str:
    """The network interface that the listeners of a rule are bound to, as written; "" for none."""
    listen = rule.listen
    if not isinstance(listen, Address):
        return ""
    return rule.options.device or listen.host.partition("%")[2]


def _can_go_deaf(rule: Rule) -> bool:
    return bool(interface_of(rule)) or _is_in_group(rule) or _has_file(rule)


def _is_in_group(rule: Rule) -> bool:
    listen = rule.listen
    if not (isinstance(listen, Address) and listen.is_literal):
        return False
    return ip_address(listen.host).is_multicast


def _has_file(rule: Rule) -> bool:
    return isinstance(rule.listen, UnixAddress) and rule.listen.path.startswith("/")


def check_descriptors(listening: int, workers: int, what: str) -> None:
    """Refuse more sockets than there are descriptors, before any is bound. Raises StartupError."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The master has all sockets. A worker that adopts those of all others has them all, too.
    needed = listening + workers * DESCRIPTORS_OF_A_WORKER + RESERVED_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise StartupError(
            f"{what} need at least {needed} file descriptors "
            f"and 2 for each session, the limit is {limit}; "
            "hint: raise the limit of open files (LimitNOFILE=, ulimit -n), or use fewer workers"
        )


def _by_host(addresses: Iterable[BindAddress]) -> list[list[BindAddress]]:
    """The addresses of a rule, those of one host together: all its ports are bound, or none."""
    hosts: dict[object, list[BindAddress]] = {}
    for address in addresses:
        target = address.target
        key: object = target.sockaddr
        if isinstance(target.sockaddr, tuple):
            key = (target.sockaddr[0], *target.sockaddr[2:])
        hosts.setdefault(key, []).append(address)
    return list(hosts.values())


def _check_taken(
    rule: Rule, addresses: Iterable[BindAddress], taken: Mapping[BindAddress, Rule]
) -> None:
    """A name may have come to mean what another rule listens on. Raises BindError."""
    for address in addresses:
        if address in taken and taken[address].name != rule.name:
            why = f"cannot listen on {address.target}, as rule {taken[address].name!r} does"
            raise BindError(rule, why, "remove one of the two rules")
