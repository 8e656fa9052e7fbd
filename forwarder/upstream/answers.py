"""What is known of a host name: a value, and how it travels between processes. Looks nothing up."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.net.sockets import Target

if TYPE_CHECKING:
    from collections.abc import Iterable

# Addresses of one name: what a session would try, and what fits into a message. Arbitrary.
MAX_ADDRESSES: Final = 64
_MAX_SCOPE: Final = 1 << 32
_MAX_TIME: Final = 1 << 53  # what a float counts one by one; NaN is not below it


class Record(NamedTuple):
    """A server of a service, as an SRV record has it; sorted, those come first that are first used.

    ``host`` is a name; ``weight`` is 0 to 65535, where 0 is the least and not none.
    """

    priority: int
    weight: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the last look-up of a name found, and what is still in use of earlier ones.

    ``addresses`` have port 0; those of the last look-up that found some, or none. ``why``: why the
    last look-up found none, "" if it found some; ``is_final``: because the name does not exist, not
    because no name server answered. ``since``: when that began, in monotonic seconds, which are the
    same for all processes. ``good_for_s``: how long DNS says that it holds, None if that is not
    known; not told to others. ``records`` are those of a service, which has no addresses itself; as
    with these, those of the last look-up that found some. None: never any; empty: the service says
    that it has no server, which ``why`` repeats.
    """

    addresses: tuple[Target, ...]
    why: str = ""
    is_final: bool = False
    since: float = 0.0
    good_for_s: float | None = field(default=None, compare=False)
    records: tuple[Record, ...] | None = None

    def after(self, known: Answer | None) -> Answer:
        """What is known of the name now, if ``known`` was before.

        Addresses stay until others are found; an unchanged answer keeps its age.
        """
        if known is None:
            return self
        addresses = known.addresses if self.why else self.addresses
        records = known.records if self.records is None else self.records
        is_same = bool(self.why) == bool(known.why) and (addresses, records) == (
            known.addresses,
            known.records,
        )
        since = known.since if is_same else self.since
        return replace(self, addresses=addresses, records=records, since=since)

    def as_json(self) -> list[object]:
        """The answer as JSON."""
        found = [[target.family, *_host_and_scope(target)] for target in self.addresses]
        records = [] if self.records is None else [self.records]
        return [found, self.why, self.is_final, self.since, *records]

    @staticmethod
    def from_json(value: object) -> Answer:
        """What :meth:`as_json` has written. Raises ValueError or TypeError for anything else."""
        if not isinstance(value, list):
            raise TypeError("not an answer")
        found, why, is_final, since, *records = value
        is_answer = isinstance(found, list) and isinstance(why, str) and isinstance(is_final, bool)
        if not is_answer or not isinstance(since, int | float) or not 0 <= since < _MAX_TIME:
            raise TypeError("not an answer")
        return Answer(
            tuple(_target(*one) for one in found),
            why,
            is_final,
            since,
            records=tuple(_record(*one) for one in records[0]) if records else None,
        )


def _host_and_scope(target: Target) -> tuple[str, int]:
    address = target.sockaddr
    return address[0], int(address[3]) if len(address) == 4 else 0


def _target(family: object, host: object, scope: object) -> Target:
    if not isinstance(host, str) or not isinstance(scope, int) or not 0 <= scope < _MAX_SCOPE:
        raise TypeError("not an address")
    if family == socket.AF_INET:
        return Target(socket.AF_INET, (str(IPv4Address(host)), 0))
    if family == socket.AF_INET6:
        return Target(socket.AF_INET6, (str(IPv6Address(host)), 0, 0, scope))
    raise ValueError("neither IPv4 nor IPv6")


def _record(priority: object, weight: object, host: object, port: object) -> Record:
    numbers = [one for one in (priority, weight, port) if type(one) is int and 0 <= one < 1 << 16]
    if len(numbers) != 3 or not numbers[2] or not isinstance(host, str):
        raise TypeError("not a record")
    return Record(numbers[0], numbers[1], host, numbers[2])


def targets_of(found: Iterable[tuple[int, tuple[object, ...]]]) -> tuple[Target, ...]:
    """Addresses as getaddrinfo gives them, family and socket address, each once and in order."""
    targets = [
        Target(family, (address[0], 0, *address[2:]))  # type: ignore[arg-type]  # IP families only
        for family, address in found
        if family in (socket.AF_INET, socket.AF_INET6)
    ]
    return tuple(dict.fromkeys(targets))[:MAX_ADDRESSES]
