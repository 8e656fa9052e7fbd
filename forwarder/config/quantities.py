"""Rates and bandwidths as people write them: "100/s", "30/m"; "100Mbit", "2MB"."""

from __future__ import annotations

import math
import re

RATE_FORMS = 'new sessions per second, or a text such as "100/s", "30/m" or "600/h"'
BANDWIDTH_FORMS = 'a text such as "512kbit", "100Mbit", "1Gbit" (bits) or "2MB", "64KiB" (bytes)'

# Between a session in a day and more than a worker can accept.
MIN_RATE, MAX_RATE = 1 / 86400, 1e6
# Below this a single read is seconds of traffic; above it nothing is limited.
MIN_BANDWIDTH, MAX_BANDWIDTH = 1000.0, 125e9

_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)/([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_BANDWIDTH = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([kKMG]i?)?(bit|B)(?:/s|ps)?")
_PREFIXES = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_rate(value: object) -> float:
    """Return sessions per second. Raises ValueError saying what is wrong with the value."""
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        rate = float(match[1]) / _SECONDS[match[2]]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        rate = float(value) if abs(value) < 1e9 else math.inf  # no float is as large as any int
    else:
        raise ValueError("is not a rate")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"is not between one a day and {MAX_RATE:,.0f} a second")
    return rate


def parse_bandwidth(value: object) -> float:
    """Return bytes per second. Raises ValueError saying what is wrong with the value."""
    match = _BANDWIDTH.fullmatch(value) if isinstance(value, str) else None
    prefix = (match[2] or "") if match else ""
    if match is None or prefix not in _PREFIXES:
        raise ValueError("is not a bandwidth")
    amount = float(match[1]) * _PREFIXES[prefix]
    per_second = amount / 8 if match[3] == "bit" else amount
    if not MIN_BANDWIDTH <= per_second <= MAX_BANDWIDTH:
        raise ValueError("is not between 8kbit and 1000Gbit")
    return per_second
