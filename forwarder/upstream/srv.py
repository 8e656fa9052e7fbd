"""Asking DNS for the servers of a service (RFC 2782). Blocks for LIMIT_S at most."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from forwarder.config.address import SRV, AddressError, parse_host
from forwarder.upstream.answers import MAX_ADDRESSES, Answer, Record

if TYPE_CHECKING:
    from collections.abc import Iterable

# For all name servers together, as much as the system takes for one: resolv.conf(5).
LIMIT_S: Final = 5.0
NOT_OFFERED: Final = "the service is not available at this domain"


def look_up_service(service: str) -> Answer:
    """The records of ``srv:NAME``; without the extra ``dns`` the answer says so."""
    try:
        import dns.exception  # noqa: PLC0415 - 15 MiB, for the process alone that asks
        import dns.resolver  # noqa: PLC0415
    except ImportError:
        return Answer((), "SRV records are looked up by dnspython, which is missing")
    try:
        # Made anew each time: it reads resolv.conf, which may be another one.
        answer = dns.resolver.Resolver().resolve(
            service.removeprefix(SRV), "SRV", lifetime=LIMIT_S, search=True
        )
    except dns.resolver.NXDOMAIN:
        return Answer((), "there is no such name", is_final=True)
    except dns.resolver.NoAnswer:
        return Answer((), "it has no SRV records", is_final=True)
    except (dns.exception.DNSException, OSError, UnicodeError) as err:
        return Answer((), _why(err))
    said = [
        (one.priority, one.weight, one.port, one.target.to_text()) for one in answer.rrset or ()
    ]
    return _answer(said, max(0.0, answer.expiration - time.time()))


def _why(err: Exception) -> str:
    lines = str(err).splitlines()
    return lines[0] if lines else type(err).__name__


def _answer(said: Iterable[tuple[int, int, int, str]], good_for_s: float) -> Answer:
    """What records mean: priority, weight, port and target, the root for no service at all."""
    found = []
    for priority, weight, port, target in said:
        if target == ".":
            return Answer((), NOT_OFFERED, records=(), good_for_s=good_for_s)
        try:
            host = parse_host(target.rstrip("."))
        except AddressError:
            continue
        if port:
            found.append(Record(priority, weight, host.lower(), port))
    if not found:
        return Answer((), "its SRV records have no host and port that can be used")
    # In one order, whatever that of the answers is.
    return Answer((), records=tuple(sorted(set(found))[:MAX_ADDRESSES]), good_for_s=good_for_s)
