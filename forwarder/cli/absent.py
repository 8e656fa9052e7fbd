"""What a configuration names and this host lacks at the moment: warnings of ``check``."""

from __future__ import annotations

import os
import shutil
import socket
from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address
from forwarder.errors import Issue
from forwarder.net import sockets
from forwarder.net.zones import index_of
from forwarder.upstream.lookup import look_up_all
from forwarder.upstream.wanted import listening_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from forwarder.config.model import Rule
    from forwarder.errors import Place
    from forwarder.net.sockets import IpSockAddr, Target

# The user of ``check`` waits; a name that is not answered by then is not judged.
_LOOK_UP_S: Final = 2.0


def absent_addresses(rules: Iterable[Rule]) -> list[Issue]:
    """A warning for each rule that would listen on some addresses of its name only.

    Looks names up, and blocks 2 s at most for that. Listens on nothing.
    """
    every = tuple(rules)
    names = listening_names(every)
    answers = look_up_all(names, _LOOK_UP_S) if names else {}
    found: list[Issue] = []
    for rule in every:
        listen = rule.listen
        if not isinstance(listen, Address) or listen.host not in answers:
            continue
        addresses = answers[listen.host].addresses
        absent = [text for target in addresses if (text := _why_absent(target))]
        if absent and len(absent) < len(addresses):
            what = f"this host lacks some addresses of {listen}: {'; '.join(absent)}"
            hint = "the rule listens on the others, and on these when they can be bound"
            found.append(Issue(rule.place, what, hint=hint, is_warning=True))
    return found


def absent_interfaces(rules: Iterable[Rule]) -> list[Issue]:
    """A warning for each interface that the upstreams of a rule need and that is missing."""
    return [
        Issue(
            place,
            f"{what}: there is no interface {interface} now",
            hint="it is waited for; until it exists no session can go that way",
            is_warning=True,
        )
        for rule in rules
        for what, interface, place in _interfaces(rule)
        if not index_of(interface)
    ]


def absent_commands(rules: Iterable[Rule]) -> list[Issue]:
    """A warning for each command of a check that this host lacks, or that cannot be run."""
    first: dict[str, Rule] = {}
    for rule in rules:
        if rule.group.check and rule.group.check.argv:
            first.setdefault(rule.group.check.argv[0], rule)
    return [
        Issue(
            rule.place,
            f"the check of this rule runs {command}, which is no command here now",
            hint="until it can be run, its servers are down",
            is_warning=True,
        )
        for command, rule in first.items()
        if shutil.which(command) is None
    ]


def _interfaces(rule: Rule) -> Iterator[tuple[str, str, Place]]:
    hosts = [(f"upstream {up}", up.host) for up in rule.upstream_ends if isinstance(up, Address)]
    hosts += [(f"source_address {rule.source}", rule.source or "")]
    for what, host in hosts:
        _, is_zoned, zone = host.partition("%")
        if is_zoned:
            yield what, zone, rule.place
    device = rule.options.upstream_device
    if device is not None:
        place = dict(rule.options.places).get("upstream_device", rule.place)
        yield f"upstream_device {device}", device, place


def _why_absent(target: Target) -> str:
    """Why an address cannot be bound, whatever the port; "" if it can."""
    address = sockets.with_port(target.sockaddr, 0)
    try:
        with socket.socket(target.family, socket.SOCK_DGRAM) as sock:
            sock.bind(address)
    except OSError as err:
        return f"{_host(address)}: {os.strerror(err.errno or 0)}"
    return ""


def _host(address: IpSockAddr | str) -> str:
    return address if isinstance(address, str) else address[0]
