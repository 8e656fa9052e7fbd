"""What the addresses of rules may be, alone and together: the checks that hold for every dialect.

Pure. Resolves no host names: two listen addresses are the same when they are written alike, or
are spellings of one IP address.
"""

from __future__ import annotations

import ipaddress
import posixpath
from typing import TYPE_CHECKING

from forwarder.config.address import MAX_PORT, Address, UnixAddress, canonical_host, format_ports
from forwarder.config.model import Protocol

if TYPE_CHECKING:
    from forwarder.config.address import Endpoint
    from forwarder.config.raw import Issues, Placed, RawRule

# Options with which one address may mean two places (ip-rule(8), ip-vrf(8)).
_STEERING = frozenset({"device", "mark", "upstream_device", "upstream_mark"})
WILDCARDS = ("0.0.0.0", "::")


def transport(protocol: Protocol) -> str:
    """The transport of the clients, as in the name of a rule."""
    return "udp" if protocol.listens_on_udp else "tcp"


# -- all rules together


def check_listeners(rules: list[RawRule], issues: Issues) -> None:
    """Two rules cannot take the same clients; SO_REUSEPORT would silently let them share."""
    by_host: dict[tuple[str, str], list[tuple[int, int, RawRule]]] = {}
    by_path: dict[str, RawRule] = {}
    for number, rule in enumerate(rules):
        listen = rule.listen.value
        if isinstance(listen, UnixAddress):
            first = by_path.setdefault(_canonical_path(listen), rule)
            if first is not rule:
                _report_overlap(rule, first, issues)
            continue
        host = (transport(rule.protocol), canonical_host(listen.host))
        by_host.setdefault(host, []).append((listen.port, number, rule))
    for found in by_host.values():
        _check_ports(found, issues)


def _check_ports(found: list[tuple[int, int, RawRule]], issues: Issues) -> None:
    """Report rules whose ports overlap. What overlaps anything overlaps what reaches furthest."""
    found.sort(key=lambda entry: entry[:2])
    reach, furthest = 0, found[0]
    for entry in found:
        port, number, rule = entry
        listen = rule.listen.value
        last = listen.last_port if isinstance(listen, Address) else port
        if port <= reach:
            is_later = number > furthest[1]
            later, earlier = (rule, furthest[2]) if is_later else (furthest[2], rule)
            _report_overlap(later, earlier, issues)
        if last > reach:
            reach, furthest = last, entry


def _report_overlap(rule: RawRule, first: RawRule, issues: Issues) -> None:
    listen, other = rule.listen.value, first.listen.value
    name = f"{transport(rule.protocol)} {listen}"
    what = f"{name} is already listened on by the rule at {first.listen.place}"
    hint = "remove one of the two rules or change its path"
    if isinstance(listen, Address) and isinstance(other, Address):
        hint = "remove one of the two rules or change its port"
        if (listen.port, listen.ports) != (other.port, other.ports):
            what = f"{name} has ports of {other}, where the rule at {first.listen.place} listens"
            hint = "take the ports that both have out of one of the two"
    issues.error(rule.listen.place, what, hint=hint)


def _canonical_path(address: UnixAddress) -> str:
    return address.path if address.path.startswith("@") else posixpath.normpath(address.path)


# -- one rule


def check_endpoints(rule: RawRule, issues: Issues) -> None:
    """Check where one rule listens and where it leads."""
    if rule.protocol.listens_on_udp is rule.protocol.connects_by_udp:
        for upstream in rule.upstream_ends:
            _check_loop(rule, upstream, issues)
    for upstream in rule.upstream_ends:
        _check_length(rule, upstream, issues)
    for endpoint in (rule.listen, *rule.upstream_ends):
        if isinstance(endpoint.value, UnixAddress) and rule.protocol is not Protocol.TCP:
            issues.error(
                endpoint.place,
                f"{endpoint.value} is a stream socket, and the protocol of the rule is"
                f" {rule.protocol.value}",
                allowed="unix sockets where protocol is tcp",
            )
    _check_unix_keys(rule, issues)
    _check_source(rule, issues)
    _check_many(rule, issues)


def _check_length(rule: RawRule, upstream: Placed[Endpoint], issues: Issues) -> None:
    """An upstream that is a range is as long as the range listened on."""
    listen, there = rule.listen.value, upstream.value
    if isinstance(there, UnixAddress) or there.ports == 1:
        return
    ports = listen.ports if isinstance(listen, Address) else 1
    if there.ports == ports:
        return
    hint = f"write {format_ports(there.port, ports)}, or one port for all"
    if ports == 1:
        hint = f"write {there.port}, or listen on a range, too"
    if there.port + ports - 1 > MAX_PORT:
        hint = "write one port for all, or begin at a lower one"
    issues.error(
        upstream.place,
        f"upstream {there} has {there.ports} ports and {listen} has {ports}",
        allowed="as many ports as are listened on, or one",
        hint=hint,
    )


def _check_unix_keys(rule: RawRule, issues: Issues) -> None:
    listen = rule.listen.value
    is_path = isinstance(listen, UnixAddress) and listen.path.startswith("/")
    mode = rule.keys.get("mode")
    if mode is not None and not is_path:
        issues.error(
            mode.place,
            f"mode on a rule that listens on {listen}: it is for the file of a unix socket",
            allowed="mode where listen is unix:/PATH",
        )
    for entry in rule.access if isinstance(listen, UnixAddress) else ():
        issues.error(
            entry.place,
            f"an access rule on {listen}, whose clients have no address",
            hint="say with mode who may connect"
            if is_path
            else "use unix:/PATH and say with mode who may connect",
        )


def _check_loop(rule: RawRule, upstream: Placed[Endpoint], issues: Issues) -> None:
    listen, there = rule.listen.value, upstream.value
    what = "a session would connect to itself until nothing is left"
    hint = "change the path of one of them"
    is_endless = True
    if not listens_for(listen, there):
        return
    if isinstance(there, Address) and isinstance(listen, Address):
        if there.ports > 1 and there.port != listen.port:
            what = "a session would go through this rule again and again, to the end of its ports"
            is_endless = False
        hint = "change the port or the address of one of them"
    # Another rule may take this address of a wildcard; by a mark or a device it may be elsewhere.
    is_certain = spelling(listen) == spelling(there) and not _STEERING & rule.keys.keys()
    report = issues.error if is_endless and is_certain else issues.warn
    report(
        upstream.place,
        f"upstream {there} is where this rule listens ({listen}): {what}",
        hint=hint,
    )


def listens_for(listen: Endpoint, there: Endpoint) -> bool:
    """Whether connections to ``there``, or to some port of it, arrive at ``listen``."""
    if isinstance(there, UnixAddress) or isinstance(listen, UnixAddress):
        return type(there) is type(listen) and spelling(there) == spelling(listen)
    if there.port > listen.last_port or there.last_port < listen.port:
        return False
    host, listen_host = spelling(there), spelling(listen)
    return host == listen_host or _takes(listen_host, host)


def spelling(endpoint: Endpoint) -> str:
    """One spelling for hosts and paths that are the same."""
    if isinstance(endpoint, UnixAddress):
        return _canonical_path(endpoint)
    return canonical_host(endpoint.host)


def _takes(listen_host: str, host: str) -> bool:
    """Whether a wildcard listener takes connections to the loopback host."""
    if listen_host not in WILDCARDS:
        return False
    ip = _literal(host)
    is_ours = host == "localhost" or (ip is not None and (ip.is_loopback or ip.is_unspecified))
    return is_ours and (listen_host == "::" or ip is None or ip.version == 4)


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _check_source(rule: RawRule, issues: Issues) -> None:
    """Refuse names, and an address of a family that cannot connect to the upstream."""
    given = rule.keys.get("source_address")
    if given is None:
        return
    source = _literal(str(given.value))
    if source is None:
        issues.error(
            given.place,
            f"the source {given.value!r} is a name",
            allowed="an address of this host",
            hint="write the address that the name stands for",
        )
        return
    for upstream in rule.upstream_ends:
        if isinstance(upstream.value, UnixAddress):
            issues.error(
                given.place,
                f"the source address {given.value} cannot connect to {upstream.value}",
                hint="leave it out, or give the unix socket a rule of its own",
            )
            continue
        ip = _literal(upstream.value.host)
        if ip is not None and ip.version != source.version:
            issues.error(
                given.place,
                f"the source address {given.value} is IPv{source.version} and the upstream"
                f" {upstream.value} is IPv{ip.version}",
                hint=f"give a local IPv{ip.version} address as the source",
            )


def _check_many(rule: RawRule, issues: Issues) -> None:
    """Groups and broadcast addresses are for UDP; a link-local group is of one interface."""
    listen = rule.listen
    sides = [(listen, rule.protocol.listens_on_udp, "listen")]
    sides += [(up, rule.protocol.connects_by_udp, "upstream") for up in rule.upstream_ends]
    for endpoint, is_udp, side in sides:
        if is_udp or isinstance(endpoint.value, UnixAddress) or not _is_many(endpoint.value):
            continue
        issues.error(
            endpoint.place,
            f"{side} {endpoint.value} is a multicast or broadcast address, which TCP does not have",
            allowed="an address of one host",
            hint='use it where UDP is spoken (protocol = "udp")',
        )
    address = listen.value
    if isinstance(address, UnixAddress) or not _is_many(address) or "device" in rule.keys:
        return
    ip = _literal(address.host.partition("%")[0])
    if "%" not in address.host and ip is not None and ip.version == 6 and ip.packed[1] & 15 < 3:
        issues.error(
            listen.place,
            f"listen {address} is a group of one interface, and does not say of which",
            hint=f'write [{address.host}%INTERFACE]:{address.port}, or device = "INTERFACE"',
        )


def _is_many(address: Address) -> bool:
    """Whether it is written as a multicast address, or as the broadcast address of any network."""
    ip = _literal(address.host.partition("%")[0])
    return ip is not None and (ip.is_multicast or str(ip) == "255.255.255.255")
