"""Which addresses of names to listen on this host does not have: what ``check`` says of them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address
from forwarder.errors import Issue
from forwarder.net import sockets
from forwarder.upstream.lookup import look_up_all
from forwarder.upstream.wanted import listening_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.config.model import Rule
    from forwarder.net.sockets import IpSockAddr, Target

# Who checks a configuration waits; a name that is not answered by then is not judged.
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
            what = f"{listen} is on this host not all addresses of the name: {'; '.join(absent)}"
            hint = "the rule listens on the others, and on these when they can be had"
            found.append(Issue(rule.place, what, hint=hint, is_warning=True))
    return found


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
