"""The master's listening sockets: one per address and slot, open for as long as the rule lives.

The accept queue belongs to the socket, and closing a SO_REUSEPORT listener resets whatever is
queued on it. So sockets are made here, before any worker exists, lent to workers, and outlive them.
Accepts nothing.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.errors import ConfigError, ExitCode, Issue, StartupError
from forwarder.net import sockets
from forwarder.net.sockets import Target

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from forwarder.config.model import Config, Rule


log = logging.getLogger(__name__)

# Ten thousand sockets are bound in well under a second.
START_LOCK_S: Final = 5.0
# How long the sockets of a removed rule are still served after new handshakes are turned away:
# time for those under way to finish, one retransmission included.
CLOSE_GRACE_S: Final = 1.5


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where a listener is bound. ``v6only`` matters for the IPv6 wildcard."""

    target: Target
    v6only: bool = False


def address_of(sock: socket.socket) -> BindAddress:
    """Where a listening socket is bound."""
    return BindAddress(Target(sock.family, sock.getsockname()), v6only=sockets.is_v6only(sock))


@dataclass(slots=True)
class Slotted:
    """The sockets of one address, by slot; each has an id that never names another socket."""

    sockets: list[socket.socket]
    ids: list[int]


def bind_addresses(config: Config) -> dict[str, tuple[BindAddress, ...]]:
    """The addresses each rule listens on, by rule name. A host name may stand for several.

    The IPv6 wildcard accepts IPv4 too, unless another rule has the IPv4 wildcard of that port.
    Blocks while names are resolved. Raises StartupError naming the rule and its place, and
    ConfigError when two rules turn out to listen on one address.
    """
    issues: list[Issue] = []
    first: dict[BindAddress, Rule] = {}
    ipv4_wildcards = {rule.listen.port for rule in config.rules if rule.listen.host == "0.0.0.0"}
    found: dict[str, tuple[BindAddress, ...]] = {}
    for rule in config.rules:
        v6only = rule.listen.host != "::" or rule.listen.port in ipv4_wildcards
        found[rule.name] = tuple(
            BindAddress(target, v6only=v6only and target.family == socket.AF_INET6)
            for target in _resolve_listen(rule)
        )
        for address in found[rule.name]:
            other = first.setdefault(address, rule)
            if other is not rule:
                issues.append(
                    Issue(
                        rule.place,
                        f"rule {rule.name!r} listens on {address.target}, as rule "
                        f"{other.name!r} at {other.place} does by another name",
                        hint="one of the two would never see a client; remove it",
                    )
                )
    if issues:
        raise ConfigError(issues)
    return found


def _resolve_listen(rule: Rule) -> list[Target]:
    try:
        answers = socket.getaddrinfo(
            rule.listen.host, rule.listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as err:
        raise StartupError(
            f"{rule.place}: rule {rule.name!r} cannot listen on {rule.listen}: {err.strerror}; "
            "hint: use an address of this host"
        ) from err
    targets = [Target(family, sockaddr) for family, _, _, _, sockaddr in answers]  # type: ignore[arg-type]  # IP only
    return list(dict.fromkeys(targets))


@contextmanager
def start_lock() -> Generator[None]:
    """Let one instance at a time probe and bind, so that two that start together see each other.

    The lock is an abstract unix socket of this network namespace (unix(7)): the kernel frees it
    with the process. Blocks up to START_LOCK_S; who holds it longer is ignored, with a warning.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        until = time.monotonic() + START_LOCK_S
        while True:
            try:
                lock.bind("\0forwarder-start")
            except OSError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue
                log.warning("start: another process holds the start lock; going on without it")
            break
        yield


class ListenerTable:
    """All listening sockets of this instance, by address and slot. Owns them."""

    def __init__(self) -> None:
        self._by_address: dict[BindAddress, Slotted] = {}
        self._inherited: dict[BindAddress, list[socket.socket]] = {}
        self._ids = itertools.count(1)

    def __contains__(self, address: BindAddress) -> bool:
        return address in self._by_address

    def addresses(self) -> Iterable[BindAddress]:
        """All addresses that have sockets."""
        return self._by_address.keys()

    def inherit(self, given: Iterable[socket.socket]) -> None:
        """Own listening sockets that somebody else has bound; :meth:`add` uses those that fit."""
        for sock in given:
            self._inherited.setdefault(address_of(sock), []).append(sock)

    def unclaimed(self) -> list[BindAddress]:
        """Addresses of inherited sockets for which there is no rule."""
        return list(self._inherited)

    def close_unclaimed(self, *, refuse: bool) -> None:
        """Close our copies of the sockets of :meth:`unclaimed`.

        ``refuse``: who gave them to us will close them, too, so no new handshake may begin there.
        But where the port is still served, at another address, no SYN may be lost.
        """
        ports = {address.target.sockaddr[1] for address in self._by_address}
        for address, inherited in self._inherited.items():
            for sock in inherited:
                if refuse and address.target.sockaddr[1] not in ports:
                    sockets.drop_syn(sock)
                sock.close()
        self._inherited.clear()

    def most_slots(self) -> int:
        """The number of slots of the address that has most."""
        return max((len(slotted.sockets) for slotted in self._by_address.values()), default=0)

    def all_descriptors(self) -> list[int]:
        """Every socket, in the order in which an heir would put them into slots again."""
        return [sock.fileno() for slotted in self._by_address.values() for sock in slotted.sockets]

    def add(self, wanted: Mapping[BindAddress, Rule], slots: int) -> None:
        """Make ``slots`` sockets for each address that has none yet: all of them, or nothing.

        Raises StartupError naming the rule, its place, and what to do.
        """
        made: list[BindAddress] = []
        try:
            for address, rule in wanted.items():
                if address not in self._by_address:
                    made.append(address)
                    self._open(address, rule, slots)
        except BaseException:
            self.close(made)
            raise

    def grow(self, rules: Mapping[BindAddress, Rule], slots: int) -> None:
        """Give every address sockets for ``slots`` slots, or none any more than it has.

        Never takes any away. Raises StartupError.
        """
        grown: list[Slotted] = []
        try:
            for address, rule in rules.items():
                slotted = self._by_address[address]
                while len(slotted.sockets) < slots:
                    self._open_one(address, rule, slotted)
                    grown.append(slotted)
        except BaseException:
            for slotted in reversed(grown):  # nobody would serve these
                slotted.ids.pop()
                slotted.sockets.pop().close()
            raise

    def descriptors(self, address: BindAddress, slots: Iterable[int]) -> dict[int, int]:
        """Id to descriptor of the sockets of an address in some slots, as far as it has any there.

        An address that came after the number of slots had shrunk has fewer than the others.
        """
        slotted = self._by_address[address]
        made = len(slotted.sockets)
        return {slotted.ids[i]: slotted.sockets[i].fileno() for i in slots if i < made}

    def refuse_handshakes(self, address: BindAddress) -> None:
        """Let no new handshake begin on an address; what is queued or under way can be accepted."""
        for sock in self._by_address[address].sockets:
            sockets.drop_syn(sock)

    def accept_handshakes(self, address: BindAddress) -> None:
        """Undo :meth:`refuse_handshakes`; harmless where that was not done."""
        for sock in self._by_address[address].sockets:
            sockets.pass_syn(sock)

    def close(self, addresses: Iterable[BindAddress] | None = None) -> None:
        """Close the sockets of some addresses, or of all."""
        if addresses is None:
            for sock in itertools.chain(*self._inherited.values()):
                sock.close()
            self._inherited.clear()
        for address in list(self._by_address if addresses is None else addresses):
            slotted = self._by_address.pop(address, None)
            for sock in slotted.sockets if slotted else ():
                sock.close()

    def _open(self, address: BindAddress, rule: Rule, slots: int) -> None:
        slotted = self._by_address[address] = Slotted([], [])
        if address in self._inherited:
            for sock in self._inherited.pop(address):
                sockets.prepare_listener(sock)
                self._put(sock, slotted)
        elif not self._is_own_port(address):
            try:
                sockets.probe_bind(address.target, v6only=address.v6only)
            except OSError as err:
                raise _bind_error(address, rule, err) from err
        while len(slotted.sockets) < slots:
            self._open_one(address, rule, slotted)

    def _is_own_port(self, address: BindAddress) -> bool:
        """Whether we listen on the port at another address: then a probe would meet ourselves."""
        port = address.target.sockaddr[1]
        return any(
            other.target.sockaddr[1] == port and slotted.sockets
            for other, slotted in self._by_address.items()
        )

    def _open_one(self, address: BindAddress, rule: Rule, slotted: Slotted) -> None:
        first = slotted.sockets[0] if slotted.sockets else None
        try:
            if first and not first.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
                # A service manager bound it without ReusePort=: no second one can be bound beside
                # it, so all slots share this one and its queue.
                sock = first.dup()
            else:
                sock = sockets.listen_tcp(address.target, v6only=address.v6only)
        except OSError as err:
            raise _bind_error(address, rule, err) from err
        self._put(sock, slotted)

    def _put(self, sock: socket.socket, slotted: Slotted) -> None:
        slotted.sockets.append(sock)
        slotted.ids.append(next(self._ids))


_HINTS = {
    errno.EADDRINUSE: "another program, or another forwarder, listens there: `ss -ltnp` shows it",
    errno.EADDRNOTAVAIL: "this host has no such address: `ip address` lists those it has",
    errno.EACCES: "ports below net.ipv4.ip_unprivileged_port_start (1024) need root "
    "or CAP_NET_BIND_SERVICE",
    errno.EMFILE: "raise the limit of open files (LimitNOFILE=, ulimit -n)",
}


def _bind_error(address: BindAddress, rule: Rule, err: OSError) -> StartupError:
    number = err.errno or 0
    no_permission = number in (errno.EACCES, errno.EPERM)
    hint = _HINTS.get(number)
    return StartupError(
        f"{rule.place}: rule {rule.name!r} cannot listen on {address.target}: "
        f"{os.strerror(number)}" + (f"; hint: {hint}" if hint else ""),
        ExitCode.NO_PERMISSION if no_permission else ExitCode.UNAVAILABLE,
    )
