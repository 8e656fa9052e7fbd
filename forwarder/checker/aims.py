"""Where the checks of a server go: its addresses, and the way there that its clients take."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.checker.outcome import Aim
from forwarder.config.address import UnixAddress
from forwarder.config.model import CheckKind
from forwarder.net.options import to_connect
from forwarder.net.sockets import Target, unix_target, with_port
from forwarder.net.zones import Zoned, literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.messages import Checked
    from forwarder.config.address import Endpoint
    from forwarder.config.model import Check, Upstream
    from forwarder.net.sockets import SockAddr
    from forwarder.upstream.answers import Answer

# Of the addresses of a name, those that one check tries. Arbitrary: two families, two hosts.
MOST_ADDRESSES: Final = 4


class Unknown(Exception):  # noqa: N818 - no fault
    """There is no address to check. ``is_ours``: that says nothing of the server."""

    def __init__(self, why: str, *, is_ours: bool) -> None:
        super().__init__(why)
        self.why = why
        self.is_ours = is_ours


def is_fixed(upstream: Upstream, checked: Checked) -> bool:
    """Whether :func:`aims_at` has always the same to say of a server."""
    end = upstream.end
    has_zone = checked.source is not None and "%" in checked.source
    if isinstance(end, UnixAddress):
        return not has_zone
    return end.is_literal and "%" not in end.host and not has_zone


def aims_at(
    upstream: Upstream, checked: Checked, check: Check, answer: Callable[[str], Answer | None]
) -> list[Aim]:
    """Where to check a server, at least one; ``answer`` says what is known of a name now.

    Raises Unknown.
    """
    # Checks are not made in the name of a client, and last too short for two of the options.
    options = replace(checked.options, transparent=False, nodelay=False, keepalive=False)
    how = to_connect(options, is_udp=check.kind is CheckKind.UDP)
    return [
        Aim(target, how[target.family], _source(checked.source, target.family), str(upstream))
        for target in _targets(upstream.end, check.port, answer)
    ]


def _targets(
    end: Endpoint, check_port: int, answer: Callable[[str], Answer | None]
) -> tuple[Target, ...]:
    if isinstance(end, UnixAddress):
        return (unix_target(end.path),)
    port = check_port or end.port
    if not end.is_literal:
        known = answer(end.host)
        if known is None:
            raise Unknown(f"{end.host} is not looked up yet", is_ours=True)
        if not known.addresses:
            raise Unknown(f"{end.host}: {known.why}", is_ours=False)
        addresses = known.addresses[:MOST_ADDRESSES]
        return tuple(Target(one.family, with_port(one.sockaddr, port)) for one in addresses)
    found = literal(end.host, port)
    target = found.target() if isinstance(found, Zoned) else found
    if target is None:
        raise Unknown(f"there is no interface for {end.host}", is_ours=True)
    return (target,)


def _source(source: str | None, family: int) -> SockAddr | None:
    if source is None or family == socket.AF_UNIX:
        return None
    found = literal(source, 0)
    target = found.target() if isinstance(found, Zoned) else found
    if target is None:
        raise Unknown(f"there is no interface for source_address {source}", is_ours=True)
    return target.sockaddr if target.family == family else None
