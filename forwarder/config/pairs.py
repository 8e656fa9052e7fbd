"""From pairs of addresses on the command line to a checked configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.config.address import (
    ADDRESS_FORMS,
    UPSTREAM_FORMS,
    AddressError,
    parse_listen,
    parse_upstream,
    split_transport,
)
from forwarder.config.loading import Loaded
from forwarder.config.model import Protocol, Upstream
from forwarder.config.raw import Issues, Placed, RawConfig, RawRule
from forwarder.config.resolve import resolve
from forwarder.errors import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.config.address import Endpoint

_PROTOCOLS: Final = {
    ("tcp", "tcp"): Protocol.TCP,
    ("udp", "udp"): Protocol.UDP,
    ("udp", "tcp"): Protocol.UDP_TO_TCP,
    ("tcp", "udp"): Protocol.TCP_TO_UDP,
}


@dataclass(frozen=True, slots=True)
class _Side:
    """One address and its transport: "tcp", "udp", or "" if it is not given."""

    address: Endpoint
    transport: str


def from_pairs(listens: Sequence[str], remotes: Sequence[str], *, is_udp: bool = False) -> Loaded:
    """Make rules of ``--listen`` and ``--remote`` addresses, the first with the first.

    The transport of one address (``udp:HOST:PORT``) holds for the other one, too, unless that has
    its own. If neither has one, it is TCP, or UDP if ``is_udp``.
    Raises ConfigError with every problem found.
    """
    issues = Issues()
    here, there = Place("--listen"), Place("--remote")
    if len(listens) != len(remotes):
        issues.error(
            here,
            f"{len(listens)} listen and {len(remotes)} remote addresses are given",
            allowed="as many of one as of the other",
            hint="they are taken in pairs, the first with the first",
        )
    raw = RawConfig(rules_seen=max(len(listens), len(remotes)))
    listen_sides = [_side(text, here, issues, is_upstream=False) for text in listens]
    remote_sides = [_side(text, there, issues, is_upstream=True) for text in remotes]
    for listen, remote in zip(listen_sides, remote_sides, strict=False):
        if listen and remote:
            raw.rules.append(
                RawRule(
                    place=here,
                    listen=Placed(listen.address, here),
                    upstreams=(Placed(Upstream(remote.address), there),),
                    protocol=_protocol(listen.transport, remote.transport, is_udp=is_udp),
                )
            )
    config = resolve(raw, "--listen", issues)
    return Loaded(config, issues.finish())


def _protocol(listen: str, remote: str, *, is_udp: bool) -> Protocol:
    if is_udp:
        return _PROTOCOLS[listen or "udp", remote or "udp"]
    return _PROTOCOLS[listen or remote or "tcp", remote or listen or "tcp"]


def _side(text: str, place: Place, issues: Issues, *, is_upstream: bool) -> _Side | None:
    """Read an address; None if it is none, which is reported."""
    try:
        transport, rest = split_transport(text)
        address = parse_upstream(rest) if is_upstream else parse_listen(rest)
    except AddressError as error:
        allowed = UPSTREAM_FORMS if is_upstream else ADDRESS_FORMS
        issues.error(
            place,
            str(error),
            allowed="" if error.hint else f"{allowed}, with udp: before it for UDP",
            hint=error.hint,
        )
        return None
    return _Side(address, transport)
