"""Patterns of clients in access rules: what may be written, and what it means.

Pure: texts in, values out. Whether a client matches is decided in ``relay.access``; where a bad
pattern stands is for the configuration to say.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from forwarder.config.address import is_ip

PATTERN_FORMS = (
    "an address (10.0.0.1, fe80::1), a network (10.0.0.0/8, fe80::/10) or a text with * and ?"
)

# The longest text a client address can have: IPv6 with a dotted tail, "%", an interface name.
_MAX_CLIENT_TEXT = 45 + 1 + 15
_WILDCARD_CHARACTERS = re.compile(r"[0-9A-Fa-f:.*?]*(?:%[0-9A-Za-z_.*?@+=~-]+)?")
_PARTIAL_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){0,2}\.?")


class PatternError(ValueError):
    """A pattern that no client can ever match; ``hint`` says what to write, or is empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Network:
    """An address (full ``prefix``) or a CIDR network; ``scope`` is an interface name or empty."""

    version: int
    prefix: int
    number: int
    scope: str = ""


@dataclass(frozen=True, slots=True)
class Wildcard:
    """A text with at least one ``*`` or ``?``."""

    text: str


def parse_pattern(text: str) -> Network | Wildcard:
    """Read one pattern. Raises PatternError for one that can never match a client."""
    if "[" in text or "]" in text:
        bare = text.replace("[", "").replace("]", "")
        raise PatternError(
            f"{text!r} has brackets, which are no part of a client address", f"write {bare}"
        )
    if "/" in text:
        return _parse_network(text)
    if "*" in text or "?" in text:
        _check_wildcard(text)
        return Wildcard(text)
    if not is_ip(text):
        raise PatternError(f"{text!r} is not an IP address", _hint_for_text(text))
    ip = ipaddress.ip_address(text)
    scope = text.partition("%")[2]
    return Network(ip.version, ip.max_prefixlen, int(ip), scope)


def _parse_network(text: str) -> Network:
    base, _, prefix = text.partition("/")
    if "*" in base or "?" in base:
        raise PatternError(f"{text!r} mixes wildcards with a prefix length", "use one of the two")
    if not is_ip(base) or "%" in base:
        raise PatternError(f"{text!r} is not a network: {base!r} is not an IP address")
    ip = ipaddress.ip_address(base)
    is_number = len(prefix) <= 3 and prefix.isascii() and prefix.isdigit()
    if not is_number or int(prefix) > ip.max_prefixlen:
        raise PatternError(
            f"{text!r} is not a network: {prefix!r} is not a prefix length from 0 to"
            f" {ip.max_prefixlen}",
            _hint_for_netmask(text),
        )
    if int(ip) & ((1 << ip.max_prefixlen - int(prefix)) - 1):
        network = ipaddress.ip_network((ip, int(prefix)), strict=False)
        raise PatternError(
            f"{text!r} has bits set behind the prefix",
            f"write {network} for the network, {ip} for the one address",
        )
    return Network(ip.version, int(prefix), int(ip))


def _hint_for_netmask(text: str) -> str:
    try:
        return f"write {ipaddress.ip_network(text, strict=False)}"
    except ValueError:
        return ""


def _hint_for_text(text: str) -> str:
    if _PARTIAL_IPV4.fullmatch(text):
        return f"the whole address is compared; write {text.rstrip('.')}.* for all that begin so"
    if re.fullmatch(r"[0-9.]+", text):
        return "an IPv4 address has four numbers from 0 to 255, without leading zeros"
    return "clients are compared by address, never by name"


def _check_wildcard(text: str) -> None:
    """Refuse wildcard texts that match no address. Knows the common slips, not every one."""
    if not _WILDCARD_CHARACTERS.fullmatch(text):
        raise PatternError(
            f"{text!r} has characters that no client address has",
            "clients are compared by address, never by name",
        )
    if len(text.replace("*", "")) > _MAX_CLIENT_TEXT:
        raise PatternError(f"{text[:20]!r}... is longer than any address")
    start = text.partition("*")[0].partition("?")[0]
    if "." not in start or ":" in start:
        return
    # A dot before any colon or wildcard: only an IPv4 address begins so, and all of the pattern
    # has to fit one. A "?" may stand for a dot, so only parts without wildcards are judged.
    if text.count(".") > 3 or not re.fullmatch(r"[0-9.*?]+", text):
        raise PatternError(f"{text!r} begins as an IPv4 address and does not go on as one")
    for part in text.split("."):
        if "*" in part or "?" in part:
            continue
        if not part or len(part) > 3 or int(part) > 255 or (part[0] == "0" and part != "0"):
            raise PatternError(
                f"{text!r}: {part!r} is not a part of an IPv4 address",
                "each part is a number from 0 to 255, without leading zeros",
            )
