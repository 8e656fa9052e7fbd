"""Where rules listen, as the kernel wants it: names resolved, ranges of ports spelled out.

Also what it means when such an address cannot be bound. Binds nothing.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Protocol

from forwarder.config.address import Address, UnixAddress
from forwarder.errors import ConfigError, ExitCode, Issue, StartupError
from forwarder.net import sockets
from forwarder.net.many import is_group
from forwarder.net.options import is_mptcp
from forwarder.net.sockets import Target

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from forwarder.config.model import Config, Rule


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where a listener is bound. ``v6only`` matters for the IPv6 wildcard.

    ``is_mptcp`` of a socket cannot be changed, so a rule that changes it needs other sockets.
    ``aside``: not 0 for listeners that were set aside, each with a number of its own; they get no
    new clients, and others may be bound to their address.
    """

    target: Target
    v6only: bool = False
    is_udp: bool = False
    is_mptcp: bool = False
    aside: int = 0

    @property
    def twin(self) -> BindAddress:
        """The same with MPTCP in place of TCP, or the other way round."""
        return replace(self, is_mptcp=not self.is_mptcp)

    @property
    def port(self) -> tuple[bool, int]:
        """Whether it is a port of UDP, and its number; 0 for a unix socket."""
        return self.is_udp, self.target.port

    @property
    def place(self) -> str:
        """As text, which is the same for whatever listens there."""
        return f"{'udp' if self.is_udp else 'tcp'} {self.target}"

    @property
    def has_handshakes(self) -> bool:
        """Whether clients need a handshake before they can be accepted."""
        return not (self.is_udp or self.target.is_unix)


def address_of(sock: socket.socket) -> BindAddress:
    """Where a listening socket is bound."""
    return BindAddress(
        sockets.bound_to(sock),
        v6only=sockets.is_v6only(sock),
        is_udp=sock.type == socket.SOCK_DGRAM,
        is_mptcp=is_mptcp(sock),
    )


class BindError(StartupError):
    """An address cannot be bound. ``why`` is the message without the rule and its place.

    ``is_final``: waiting does not help, unlike with a name that cannot be looked up just now.
    ``is_shortage``: descriptors or memory ran out, whatever the address.
    """

    def __init__(
        self,
        rule: Rule,
        why: str,
        hint: str,
        *,
        is_denied: bool = False,
        is_final: bool = True,
        is_shortage: bool = False,
    ) -> None:
        super().__init__(
            f"{rule.place}: rule {rule.name!r} {why}" + (f"; hint: {hint}" if hint else ""),
            ExitCode.NO_PERMISSION if is_denied else ExitCode.UNAVAILABLE,
        )
        self.why = why
        self.is_final = is_final
        self.is_shortage = is_shortage


class Answered(Protocol):
    """What is known of a name, see ``upstream.answers``."""

    @property
    def addresses(self) -> tuple[Target, ...]:
        """The last known ones."""

    @property
    def why(self) -> str:
        """Why the last look-up has found none."""

    @property
    def is_final(self) -> bool:
        """Whether the name does not exist."""


def bind_addresses(
    config: Config,
    answers: Mapping[str, Answered],
    unresolved: dict[str, str],
    beside: Config | None = None,
    patient: Container[str] = (),
) -> dict[str, tuple[BindAddress, ...]]:
    """The addresses each rule listens on, by rule name. A host name may stand for several.

    ``answers`` is what is known of names; none is looked up. ``beside`` is the whole configuration,
    where ``config`` has some of its rules only.
    A rule whose name has no address now gets none, and ``unresolved`` gets the reason, by rule. But
    a name that does not exist is an error, unless the rule may wait for its address or is
    ``patient``.
    Raises StartupError naming the rule and its place, and ConfigError when two rules turn out to
    listen on one address.
    """
    issues: list[Issue] = []
    first: dict[BindAddress, Rule] = {}
    wildcards = _ipv4_wildcards(beside or config)
    found: dict[str, tuple[BindAddress, ...]] = {}
    for rule in config.rules:
        try:
            found[rule.name] = tuple(_expand(rule, wildcards, answers))
        except BindError as err:
            if err.is_final and not (rule.retries_bind or rule.name in patient):
                raise
            found[rule.name] = ()
            unresolved[rule.name] = err.why
        for address in found[rule.name]:
            other = first.setdefault(address.twin if address.is_mptcp else address, rule)
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


def _ipv4_wildcards(config: Config) -> set[tuple[bool, int]]:
    """Ports of IPv4 wildcards; elsewhere the IPv6 wildcard takes IPv4 clients, too."""
    return {
        (rule.protocol.listens_on_udp, port)
        for rule in config.rules
        if isinstance(rule.listen, Address) and rule.listen.host == "0.0.0.0"
        for port in range(rule.listen.port, rule.listen.last_port + 1)
    }


def _expand(
    rule: Rule, wildcards: set[tuple[bool, int]], answers: Mapping[str, Answered]
) -> Iterator[BindAddress]:
    """Every address of a rule: each of its ports on each address of its host."""
    listen = rule.listen
    if isinstance(listen, UnixAddress):
        yield BindAddress(sockets.unix_target(listen.path))
        return
    is_udp = rule.protocol.listens_on_udp
    targets = _resolve_listen(rule, listen, answers)
    if listen.host == "::" and not sockets.has_ipv6():
        targets = [Target(socket.AF_INET, ("0.0.0.0", listen.port))]  # every address there is
    for port in range(listen.port, listen.last_port + 1):
        for target in targets:
            yield BindAddress(
                Target(target.family, sockets.with_port(target.sockaddr, port)),
                v6only=target.family == socket.AF_INET6
                and (listen.host != "::" or (is_udp, port) in wildcards),
                is_udp=is_udp,
                is_mptcp=rule.options.mptcp.on_listen,
            )


def _resolve_listen(rule: Rule, listen: Address, answers: Mapping[str, Answered]) -> list[Target]:
    if not listen.is_literal:
        return _known(rule, listen, answers.get(listen.host))
    try:
        found = socket.getaddrinfo(
            listen.host,
            listen.port,
            type=socket.SOCK_DGRAM if rule.protocol.listens_on_udp else socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST,
        )
    except OSError as err:
        why, hint = err.strerror, "use an address of this host"
        scope = listen.host.partition("%")[2]
        if scope:
            why = f"there is no network interface {scope!r} now"
            hint = 'bind = "retry" waits for one that comes later'
        raise BindError(rule, f"cannot listen on {listen}: {why}", hint) from err
    targets = [Target(family, sockaddr) for family, _, _, _, sockaddr in found]  # type: ignore[arg-type]  # IP only
    return list(dict.fromkeys(targets))


def _known(rule: Rule, listen: Address, answer: Answered | None) -> list[Target]:
    """What is known of a name to listen on. Raises BindError if there is no address."""
    if answer is not None and answer.addresses:
        return list(dict.fromkeys(map(_plain, answer.addresses)))
    why = "its name is being looked up" if answer is None else answer.why
    raise BindError(
        rule,
        f"cannot listen on {listen}: {why}",
        "use an address of this host",
        is_final=answer is not None and answer.is_final,
    )


def _plain(target: Target) -> Target:
    """An IPv4 address mapped to IPv6, as a name may have it, is IPv4: see ``parse_host``."""
    host = target.sockaddr[0]
    mapped = IPv6Address(host).ipv4_mapped if target.family == socket.AF_INET6 else None
    return target if mapped is None else Target(socket.AF_INET, (str(mapped), target.port))


_HINTS = {
    errno.EADDRINUSE: "another program, or another forwarder, listens there: `ss -lntup` shows it",
    errno.EADDRNOTAVAIL: "this host has no such address: `ip address` lists those it has",
    errno.EACCES: "ports below net.ipv4.ip_unprivileged_port_start (1024) need root "
    "or CAP_NET_BIND_SERVICE",
    errno.EAFNOSUPPORT: "this system has no IPv6: write an IPv4 address, or * for every address",
    errno.ENODEV: "there is no such network device: `ip link` lists those there are",
    errno.EMFILE: "raise the limit of open files (LimitNOFILE=, ulimit -n)",
}
_UNIX_HINTS = {
    errno.EADDRINUSE: "another program, or another forwarder, listens there: `ss -lxp` shows it",
    errno.EEXIST: "there is a file that is no socket; remove it or use another path",
    errno.EACCES: "this user must be able to write to the directory",
    errno.ENOENT: "make its directory first",
}

# A group is joined on one interface.
_NO_INTERFACE = "no route says on which interface to join this group: give the rule a device"
_GROUP_HINTS = dict.fromkeys((errno.ENODEV, errno.EADDRNOTAVAIL, errno.EINVAL), _NO_INTERFACE)


def option_error(address: BindAddress, rule: Rule, err: OSError) -> BindError:
    """The options of a rule cannot be set on the sockets that it has already."""
    number = err.errno or 0
    return BindError(
        rule,
        f"cannot change the options of the sockets at {address.target}: {os.strerror(number)}",
        _HINTS.get(number, "a restart makes new sockets"),
        is_denied=number in (errno.EACCES, errno.EPERM),
    )


def bind_error(address: BindAddress, rule: Rule, err: OSError) -> BindError:
    number = err.errno or 0
    hints = _HINTS | _UNIX_HINTS if address.target.is_unix else _HINTS
    if address.is_udp and rule.options.device is None and is_group(address.target):
        hints = hints | _GROUP_HINTS
    return BindError(
        rule,
        f"cannot listen on {address.target}: {os.strerror(number)}",
        hints.get(number, ""),
        is_denied=number in (errno.EACCES, errno.EPERM),
        is_shortage=number in sockets.OUT_OF_RESOURCES,
    )
