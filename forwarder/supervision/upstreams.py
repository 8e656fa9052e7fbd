"""What operators see of the servers of groups, and what they order of them.

Orders are the master's: they are in the table of servers for the workers, by name in ``servers``
for what comes later, and in a file for the next start if one is configured.
"""

from __future__ import annotations

import logging
import os
import pwd
import time
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.balancing.table import (
    CHECKS_FAILED,
    CHECKS_PASSED,
    EJECTIONS,
    FULL,
    SHARED,
    SINCE_NS,
    Standing,
)
from forwarder.balancing.tiers import State, in_turn, rank
from forwarder.control.orders import (
    MOST_ORDERS,
    Action,
    find,
    follow,
    listed,
    read_text,
)
from forwarder.supervision import statefile
from forwarder.system.printable import field, visible

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Collection, Iterable, Mapping

    from forwarder.config.model import Group, Settings, Upstream
    from forwarder.control.orders import Order, Wanted
    from forwarder.supervision.findings import Findings
    from forwarder.supervision.fleet import Fleet

log = logging.getLogger(__name__)

# What of the counters of a server is shown. The others are of no use there, see Ledger.server.
_SHOWN: Final = ("sessions", "sessions_total", "bytes_c2u", "bytes_u2c", "connect_ms")


class _Group(NamedTuple):
    """A group in force, and its servers by name."""

    made: Group | None
    servers: dict[str, Upstream]


_NONE: Final = _Group(None, {})


class OrderError(Exception):
    """An order that cannot be carried out; nothing was changed. Says why, for people."""


class Upstreams:
    """The servers in force with what was ordered of them. Owns the state file."""

    def __init__(
        self,
        fleet: Fleet,
        findings: Findings,
        selector: selectors.BaseSelector,
    ) -> None:
        """Whose servers these are, and what the checker has found of them."""
        self._fleet = fleet
        self._servers = fleet.servers
        self._ledger = fleet.ledger
        self._findings = findings
        self._file = statefile.StateFile(selector)
        # Now, as a directory of users may be far away, and a master that serves must not wait.
        self._own = _own_name()

    # -- over reloads, upgrades and restarts

    def begin(self, settings: Settings, *, has_predecessor: bool) -> None:
        """Read the state file, before anything is served; of a predecessor we have its orders."""
        path = settings.state_file
        self._file.use(path)
        if path is None or has_predecessor:
            return
        if why := statefile.complaint(path):
            log.warning("state.failed orders will not be kept over a restart: %s", why)
        try:
            text = statefile.read(path)
            if text:
                self._servers.take_orders(read_text(text))
                log.info("state.read file=%s orders=%d", path, len(self._servers.orders.given))
        except OSError as err:
            log.error("state.failed cannot read %s: %s; starting without", path, err.strerror)
        except ValueError as err:
            log.error("state.failed %s: %s; starting without what it says", path, visible(str(err)))

    def use(self, settings: Settings) -> None:
        """Keep orders at the place of a configuration that is in force from now on."""
        if self._file.use(settings.state_file):
            self._keep()

    def take_place(self) -> None:
        """A predecessor has left us its place: from now on the file is ours to write."""
        self._keep()

    def _keep(self, done: Callable[[str], None] = lambda _: None) -> None:
        self._file.keep(self._servers.orders.as_text(), done)

    # -- see Undertaking

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None or infinite for never."""
        return self._file.deadline

    def turn(self, now: float) -> None:
        """Go on with the state file."""
        self._file.turn(now)

    def cancel(self) -> None:
        """Go on: what was ordered shall be kept."""

    def close(self) -> None:
        """Wait for the state file, for a moment."""
        self._file.close()

    # -- orders

    def order(self, wanted: Wanted, uid: int, done: Callable[[dict[str, object]], None]) -> str:
        """Carry out an order, on all its servers or none. Returns why not, or "".

        Then ``done`` is called once, with the answer: now or, with a state file, when it is
        written, a few seconds later at most.
        """
        groups = self._groups()
        try:
            group, names = self._choose(wanted, groups)
        except OrderError as err:
            return str(err)
        now, by = time.time(), self._name_of(uid, wanted.login)
        changed = []
        for name in names:
            before = self._servers.orders.given.get((group, name))
            order = follow(
                before, wanted.action, cuts=wanted.cuts, weight=wanted.weight, by=by, at=now
            )
            if self._servers.order((group, name), order):
                changed.append(name)
                self._log(wanted.action, group, name, order)
        known = groups.get(group, _NONE)
        used = self._used(group, known)
        shown = [self._describe_one(group, one, known.servers.get(one), used) for one in names]
        answer = {
            "ok": True,
            "group": group,
            "servers": [{**one, "changed": one["server"] in changed} for one in shown],
            "is_empty": bool(known.servers) and self._is_empty(group, known.servers),
        }
        if changed:
            self._keep(lambda problem: done({**answer, "problem": problem}))
        else:
            done({**answer, "problem": self._file.problem})
        return ""

    def _choose(self, wanted: Wanted, groups: Mapping[str, _Group]) -> tuple[str, list[str]]:
        """The group, and the servers that the words of an operator mean. Raises OrderError."""
        group = wanted.group
        orders = self._servers.orders.given
        ordered = [name for at, name in orders if at == group]
        if group not in groups and not ordered:
            raise OrderError(_no_group(group, groups))
        in_force = groups.get(group, _NONE).servers
        # An order outlives its server, and may be taken back all the same.
        known = list(dict.fromkeys([*in_force, *ordered]))
        chosen = [_one_of(word, known, group) for word in wanted.servers]
        for name in chosen:
            if name not in in_force and wanted.action is not Action.ENABLE:
                raise OrderError(f"{name} is no server of the group {group!r} any more")
            if name in in_force and self._servers.seat(group, name) is None:
                raise OrderError(f"{name}: there are more servers than can be ordered something")
        if len(orders) + len(chosen) > MOST_ORDERS and wanted.action is not Action.ENABLE:
            raise OrderError(f"there are {len(orders)} orders; hint: take some back by enable")
        return group, list(dict.fromkeys(chosen))

    def _log(self, action: Action, group: str, server: str, order: Order) -> None:
        sessions = self._ledger.server(group, server)["sessions"]
        more = f" weight={order.weight}" if action is Action.WEIGHT else ""
        if action in {Action.DRAIN, Action.DISABLE}:
            more = f" reset={'yes' if order.cuts else 'no'}"
        log.info(
            "upstream.%s group=%s server=%s%s by=%s sessions=%s",
            action.value,
            field(group),
            field(server),
            more,
            field(order.by),
            sessions,
        )

    def _name_of(self, uid: int, login: str) -> str:
        """One of the two users that may ask, root or the one that we run as; and the login."""
        name = self._own if uid == os.geteuid() else "root" if uid == 0 else str(uid)
        return name if login in ("", name) else f"{name}({login})"

    def _is_empty(self, group: str, servers: Iterable[str]) -> bool:
        """Whether orders keep every server of a group from new sessions."""
        given = self._servers.orders.given
        orders = [given.get((group, name)) for name in servers]
        return all(order is not None and order.is_out for order in orders)

    # -- what there is

    def describe(self, only: str | None = None) -> list[dict[str, object]]:
        """All groups with their servers, as in the status; also servers that only have an order.

        ``only``: of this group alone.
        """
        groups = self._groups()
        servers: dict[str, dict[str, Upstream | None]] = {
            name: dict(group.servers) for name, group in groups.items()
        }
        for group, name in sorted(self._servers.orders.given):
            servers.setdefault(group, {}).setdefault(name, None)
        return [
            {
                **self._describe_group(name, groups.get(name, _NONE).made),
                "servers": [self._describe_one(name, *one, used) for one in of_it.items()],
            }
            for name, of_it in servers.items()
            if only in (None, name)
            for used in [self._used(name, groups.get(name, _NONE))]
        ]

    def _describe_group(self, name: str, made: Group | None) -> dict[str, object]:
        return {
            "name": name,
            "balance": made.balance.value if made is not None else None,
            "is_checked": made is not None and made.check is not None,
            "waiting": self._fleet.waiting(name),
        }

    def _groups(self) -> dict[str, _Group]:
        """The groups in force. Rules of one group have the same servers."""
        found: dict[str, _Group] = {}
        for rule, name in self._fleet.serving.groups():
            if rule.is_balanced and name not in found:
                found[name] = _Group(rule.group, {str(one): one for one in rule.upstreams})
        return found

    def _used(self, name: str, group: _Group) -> frozenset[str]:
        """The servers of a group that new sessions go to now, by the rules of the workers.

        While the first check of one is awaited, those that are not usable are not used.
        """
        if group.made is None:
            return frozenset()
        table, states, is_awaited = self._servers.table, [], False
        for server, upstream in group.servers.items():
            seat = self._servers.seat(name, server)
            at = SHARED if seat is None else seat
            weight, is_out = table.orders(at, upstream.weight)
            states.append(State(weight, table.share(at), upstream.is_backup, is_out))
            is_awaited |= table.standing(at) is Standing.UNKNOWN and not is_out
        fails_open = group.made.fails_open and not is_awaited
        weights = in_turn(rank(states, group.made.panic, fails_open=fails_open))
        return frozenset(one for one, weight in zip(group.servers, weights, strict=True) if weight)

    def _describe_one(
        self, group: str, name: str, upstream: Upstream | None, used: Collection[str]
    ) -> dict[str, object]:
        """A server, or what is left of one that is not in force. ``used``: see :meth:`_used`."""
        order = self._servers.orders.given.get((group, name))
        counters = self._ledger.server(group, name)
        found: dict[str, object] = {
            "server": name,
            "state": "absent",
            "order": order.as_json() if order is not None else None,
            **{key: counters[key] for key in _SHOWN},
            "failed": counters["connects_failed"],
        }
        if upstream is None:
            return found
        return found | self._describe_standing(group, name, upstream, is_used=name in used)

    def _describe_standing(
        self, group: str, name: str, upstream: Upstream, *, is_used: bool
    ) -> dict[str, object]:
        """What is configured, and what the table says now."""
        table = self._servers.table
        finding = self._findings.of(group, name)
        seat = self._servers.seat(group, name)
        found: dict[str, object] = {
            "weight": upstream.weight,
            "backup": upstream.is_backup,
            "max_sessions": upstream.max_sessions or None,
            "of": str(upstream.origin) if upstream.origin is not None else None,
            "why": finding.why if finding is not None else "",
            "is_used": is_used,
        }
        if seat is None:  # as configured, see ServerTable
            return {**found, "state": "up", "weight_now": float(upstream.weight), "share": 1.0}
        since_ns = table.word(seat, SINCE_NS)
        age_s = (time.monotonic_ns() - since_ns) / 1e9
        weight_now = table.weight(seat, upstream.weight) / FULL
        if is_used and not table.share(seat):
            weight_now = float(table.orders(seat, upstream.weight)[0])
        return {
            **found,
            "state": table.standing(seat).name.lower(),
            "since_s": round(max(0.0, age_s), 1) if since_ns else None,
            "weight_now": weight_now,
            "share": table.share(seat) / FULL,
            "checks_passed": table.word(seat, CHECKS_PASSED),
            "checks_failed": table.word(seat, CHECKS_FAILED),
            "ejections": table.word(seat, EJECTIONS),
        }


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _no_group(group: str, groups: Collection[str]) -> str:
    if not groups:
        return f"there is no group {group!r}; hint: no rule has upstreams to choose from"
    near = get_close_matches(group, groups, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {listed(sorted(groups))}"
    return f"there is no group {group!r}; hint: {hint}"


def _one_of(word: str, known: Collection[str], group: str) -> str:
    """The one server that a word means. Raises OrderError."""
    found = find(word, known)
    if len(found) == 1:
        return found[0]
    if found:
        raise OrderError(f"{word!r} may be {listed(found)}; hint: name each")
    near = get_close_matches(word, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {listed(known)}"
    raise OrderError(f"the group {group!r} has no server {word!r}; hint: {hint}")
