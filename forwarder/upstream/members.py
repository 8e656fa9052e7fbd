"""The servers that a name stands for, in place of it: from a configuration and answers. Pure.

A configuration stays as it is written; what is made here is what workers and checker get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from forwarder.config.address import Address
from forwarder.config.model import MAX_WEIGHT, Upstream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from forwarder.config.model import Rule
    from forwarder.net.sockets import Target
    from forwarder.upstream.answers import Answer, Record


def effective(upstreams: Iterable[Upstream], answers: Mapping[str, Answer]) -> tuple[Upstream, ...]:
    """Upstreams as written, with its members in place of each that is several.

    One of which no member is known stays, as a name without an answer. A server that several
    stand for is there once.
    """
    found: dict[str, Upstream] = {}
    for upstream in upstreams:
        for member in _members(upstream, answers) or (upstream,):
            found.setdefault(str(member), member)
    return tuple(found.values())


def as_written(upstreams: Iterable[Upstream]) -> tuple[Upstream, ...]:
    """What a configuration has in place of effective upstreams."""
    return tuple(dict.fromkeys(upstream.origin or upstream for upstream in upstreams))


def differ_by_members(one: Rule, other: Rule) -> bool:
    """Whether two effective rules are the same as written, and look-ups have found others."""
    return (
        one.has_members
        and other.has_members
        and as_written(one.upstreams) == as_written(other.upstreams)
        and replace(one, upstreams=other.upstreams) == other
    )


def _members(upstream: Upstream, answers: Mapping[str, Answer]) -> list[Upstream]:
    end = upstream.end
    if not upstream.is_several or not isinstance(end, Address):
        return []
    answer = answers.get(end.host)
    if answer is None:
        return []
    if end.is_service:
        return _of_service(upstream, answer.records or ())
    # In one order, whatever that of the answers is.
    hosts = sorted(map(_host, answer.addresses), key=lambda host: (":" in host, host))
    weight = upstream.weight and max(1, upstream.weight // max(1, len(hosts)))
    return [
        replace(
            upstream,
            end=Address(host, end.port, end.ports),
            weight=weight,
            expands=False,
            origin=upstream,
        )
        for host in hosts
    ]


def _host(target: Target) -> str:
    """An address as a configuration has it."""
    address = target.sockaddr
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0].partition('%')[0]}%{scope}" if scope else address[0]


def _of_service(upstream: Upstream, records: Iterable[Record]) -> list[Upstream]:
    """The servers of SRV records: those of the lowest priority first, all others as backups."""
    ordered = sorted(set(records))
    found: dict[Address, Upstream] = {}
    for record in ordered:
        end = Address(record.host, record.port)
        found.setdefault(
            end,
            replace(
                upstream,
                end=end,
                weight=record.weight,
                is_backup=upstream.is_backup or record.priority > ordered[0].priority,
                origin=upstream,
            ),
        )
    most = max((one.weight for one in found.values()), default=0)
    return [replace(one, weight=_scaled(one.weight, most)) for one in found.values()]


def _scaled(weight: int, most: int) -> int:
    """A weight of a record, up to 65535, as one of ours; 0 is little there and none here."""
    if most > MAX_WEIGHT:
        weight = round(weight * MAX_WEIGHT / most)
    return max(1, weight)
