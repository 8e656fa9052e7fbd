"""The addresses of one TOML rule: written in one of two ways, never in both.

``listen`` or ``bind_address`` and ``bind_port``; ``upstream`` or ``connect_address`` and
``connect_port``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.config.address import (
    ADDRESS_FORMS,
    UPSTREAM_FORMS,
    Address,
    AddressError,
    parse_listen,
    parse_upstream,
)
from forwarder.config.raw import Placed
from forwarder.config.toml_values import host as host_of

if TYPE_CHECKING:
    from forwarder.config.address import Endpoint
    from forwarder.config.toml_table import Table


def read_listen(table: Table) -> Placed[Endpoint] | None:
    """Where a rule listens; None when that is missing or wrong."""
    if not is_one_way(table, "listen", "bind_address", "bind_port"):
        return None
    if "listen" not in table:
        return read_host_and_port(table, "bind_address", "bind_port")
    value = table.get("listen")
    if isinstance(value, int) and not isinstance(value, bool):
        table.bad("listen", "a text in quotes", f'write "*:{value}" for all addresses')
        return None
    text = table.text("listen", ADDRESS_FORMS)
    return read_address(table, text, is_upstream=False) if text else None


def is_one_way(table: Table, joint: str, host: str, port: str) -> bool:
    """Check that an address is written in exactly one of the two ways, and completely."""
    both = f"either {joint}, or {host} and {port}"
    split = [key for key in (host, port) if key in table]
    if joint in table:
        if split:
            what = f"{joint} and {split[0]} are both given"
            table.issues.error(table.place(split[0]), what, allowed=both, hint=f"keep {joint}")
        return not split
    if len(split) == 2:
        return True
    if split:
        missing = port if split == [host] else host
        what = f"{split[0]} is given without {missing}"
        table.issues.error(table.place(split[0]), what, allowed=both, hint=f"add {missing}")
    else:
        table.issues.error(table.place(), f"the rule has no {joint} address", allowed=both)
    return False


def read_address(table: Table, text: Placed[str], *, is_upstream: bool) -> Placed[Endpoint] | None:
    try:
        address = parse_upstream(text.value) if is_upstream else parse_listen(text.value)
    except AddressError as error:
        allowed = UPSTREAM_FORMS if is_upstream else ADDRESS_FORMS
        table.issues.error(
            text.place, str(error), allowed="" if error.hint else allowed, hint=error.hint
        )
        return None
    return Placed(address, text.place)


def read_host_and_port(table: Table, host_key: str, port_key: str) -> Placed[Endpoint] | None:
    host = host_of(table, host_key)
    ports = table.ports(port_key)
    if host is None or ports is None:
        return None
    return Placed(Address(host.value, *ports.value), host.place)
