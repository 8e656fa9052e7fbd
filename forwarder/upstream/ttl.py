"""How long an answer about a name is good, as DNS says it. Blocks for DNS_LIMIT_S at most.

getaddrinfo, which knows the hosts file, search lists and all else that the system is told to ask,
gives no TTL. So it finds the addresses, and DNS is asked for their TTL only: without dnspython, or
where DNS knows nothing of a name, everything is as before, but for how often it is looked up.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# For all questions about one name. A server that has just answered the system has it at hand.
DNS_LIMIT_S: Final = 1.0
_HOSTS: Final = Path("/etc/hosts")


class Lifetime(NamedTuple):
    """``addresses`` as DNS has them, and for how many ``seconds`` from now on; 0 is not long."""

    addresses: frozenset[str]
    seconds: float


def lifetimes() -> Callable[[str], Lifetime | None] | None:
    """What tells the lifetime of a name, or nothing of it; None without the extra ``dns``."""
    return lifetime if find_spec("dns") is not None else None


def lifetime(host: str) -> Lifetime | None:
    """Ask DNS. None if it knows no address of ``host``, or the name is none of DNS."""
    import dns.exception  # noqa: PLC0415 - 15 MiB, for the process alone that asks
    import dns.resolver  # noqa: PLC0415

    if "." not in host.rstrip(".") or _is_in_hosts(host):
        return None
    until = time.monotonic() + DNS_LIMIT_S
    addresses: set[str] = set()
    expires = []
    for kind in ("A", "AAAA"):
        left_s = until - time.monotonic()
        if left_s <= 0:
            break
        try:
            # Made anew each time: it reads resolv.conf, which may be another one.
            answer = dns.resolver.Resolver().resolve(
                host, kind, lifetime=left_s, search=True, raise_on_no_answer=False
            )
        except (dns.exception.DNSException, OSError, UnicodeError):
            continue
        if answer.rrset is not None:
            addresses.update(str(ip_address(record.address)) for record in answer.rrset)
            expires.append(answer.expiration)  # of the shortest TTL on the way of a CNAME
    if not expires:
        return None
    return Lifetime(frozenset(addresses), max(0.0, min(expires) - time.time()))


def _is_in_hosts(host: str) -> bool:
    """Whether the hosts file has it: hosts(5)."""
    wanted = host.rstrip(".").lower()
    try:
        lines = _HOSTS.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(wanted in line.partition("#")[0].lower().split()[1:] for line in lines)
