"""The upstreams of one TOML rule, and the groups that rules share.

A server is written as its address, or as a table with the address ``at`` and what else there is.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.config.address import (
    PORTS,
    SERVICE_FORMS,
    SRV,
    UPSTREAM_FORMS,
    Address,
    AddressError,
    parse_service,
)
from forwarder.config.keys import OF_A_GROUP, OF_A_SERVER, read_keys, values_of
from forwarder.config.model import Upstream
from forwarder.config.raw import Placed, RawGroup
from forwarder.config.toml_addresses import is_one_way, read_address, read_host_and_port
from forwarder.config.toml_check import read_check
from forwarder.config.toml_table import describe

if TYPE_CHECKING:
    from forwarder.config.raw import RawConfig, RawKeys
    from forwarder.config.toml_table import Table

GROUP_KEYS: Final = tuple(sorted((*OF_A_GROUP, "check", "name", "servers")))
SERVER_KEYS: Final = ("at", *OF_A_SERVER)

_GROUP: Final = "group:"
# A word on a command line and in a log, and no port: group:80 is a host.
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")
NAME_FORMS: Final = "1 to 100 letters, digits, _, - and ., the first a letter or _"
_SERVER_FORMS: Final = f"{UPSTREAM_FORMS}, {SERVICE_FORMS}, or a table with at = such an address"
_RULE_FORMS: Final = f'{_SERVER_FORMS}, or a list of these, or "group:NAME"'


class Ways(NamedTuple):
    """Where a rule leads: to upstreams of its own, or to a group. Neither if that is wrong."""

    upstreams: tuple[Placed[Upstream], ...] = ()
    group: Placed[str] | None = None


def read_upstreams(table: Table) -> Ways:
    """Where a rule leads, as far as that is right."""
    if not is_one_way(table, "upstream", "connect_address", "connect_port"):
        return Ways()
    if "upstream" not in table:
        single = read_host_and_port(table, "connect_address", "connect_port")
        return Ways((Placed(Upstream(single.value), single.place),) if single else ())
    value = table.get("upstream")
    if isinstance(value, list):
        return Ways(_servers(table, "upstream"))
    if isinstance(value, dict):
        inner = table.table("upstream", SERVER_KEYS)
        server = _server(inner) if inner else None
        return Ways((server,) if server else ())
    text = table.text("upstream", _RULE_FORMS)
    if text is None:
        return Ways()
    name = _group_of(text.value)
    if name is None:
        server = _at(table, text)
        return Ways((server,) if server else ())
    if not _NAME.fullmatch(name):
        what = f"upstream: {describe(name)} is no name of a group"
        table.issues.error(text.place, what, allowed=NAME_FORMS)
        return Ways()
    return Ways(group=Placed(name, text.place))


def read_groups(top: Table, raw: RawConfig) -> None:
    """Read the groups of a file into ``raw``."""
    for table in top.tables("groups", GROUP_KEYS):
        group = _group(table)
        if group is not None:
            raw.groups.append(group)
        elif isinstance(name := table.get("name"), str):
            raw.broken_groups.add(name)


def _group(table: Table) -> RawGroup | None:
    name = table.text("name", NAME_FORMS)
    if "name" not in table:
        table.issues.error(table.place(), "a group lacks name", allowed=NAME_FORMS)
    elif name and not _NAME.fullmatch(name.value):
        table.bad("name", NAME_FORMS)
        name = None
    servers: tuple[Placed[Upstream], ...] = ()
    if "servers" not in table:
        what, allowed = "a group lacks servers", "a list of one or more"
        table.issues.error(table.place(), what, allowed=allowed)
    elif isinstance(table.get("servers"), list):
        servers = _servers(table, "servers")
    else:
        table.bad("servers", f"a list of {_SERVER_FORMS}")
    keys, check = read_keys(table, OF_A_GROUP), read_check(table)
    if name is None or not servers:
        return None
    return RawGroup(place=table.place(), name=name, servers=servers, keys=keys, check=check)


def _servers(table: Table, key: str) -> tuple[Placed[Upstream], ...]:
    items = table.get(key)
    found = []
    for index, item in enumerate(items if isinstance(items, list) else ()):
        inner = table.item(key, index, SERVER_KEYS)
        place = table.place(key, index)
        if inner is not None:
            found.append(_server(inner))
        elif isinstance(item, str):
            found.append(_at(table, Placed(item, place)))
        else:
            what = f"element {index + 1} of {key} is {describe(item)}"
            allowed = 'a text such as "10.0.0.1:80", or { at = "10.0.0.1:80", weight = 2 }'
            table.issues.error(place, what, allowed=allowed)
    if items == []:
        table.issues.error(table.place(key), f"{key} is empty", allowed="one or more")
    return tuple(server for server in found if server)


def _server(table: Table) -> Placed[Upstream] | None:
    given = read_keys(table, OF_A_SERVER)
    if "at" not in table:
        table.issues.error(table.place(), "a server lacks at", allowed=UPSTREAM_FORMS)
        return None
    text = table.text("at", UPSTREAM_FORMS)
    end = _at(table, text) if text else None
    if end is None:
        return None
    _check_several(table, end.value, given)
    values = values_of(Upstream, given, OF_A_SERVER)
    # Each reader gives what its field holds.
    return Placed(Upstream(end.value.end, **values), table.place())  # type: ignore[arg-type]


def _at(table: Table, text: Placed[str]) -> Placed[Upstream] | None:
    """A server with nothing said but its address."""
    if _group_of(text.value) is not None:
        table.issues.error(
            text.place,
            f"{text.value!r} in place of a server",
            allowed='a group as the only upstream of a rule: upstream = "group:NAME"',
            hint="put the servers that it should have, too, into the group",
        )
        return None
    if _word_behind(text.value, SRV) is not None:
        return _service(table, text)
    end = read_address(table, text, is_upstream=True)
    return Placed(Upstream(end.value), text.place) if end else None


def _service(table: Table, text: Placed[str]) -> Placed[Upstream] | None:
    """The servers of a service, which SRV records have."""
    try:
        end = parse_service(text.value)
    except AddressError as error:
        allowed = "" if error.hint else SERVICE_FORMS
        table.issues.error(text.place, str(error), allowed=allowed, hint=error.hint)
        return None
    if find_spec("dns") is None:
        table.issues.error(
            text.place,
            f"{text.value!r}: SRV records are looked up by dnspython, which is missing",
            hint="install the extra: pip install 'splice-forwarder[dns]'; or list the servers",
        )
        return None
    return Placed(Upstream(end), text.place)


def _check_several(table: Table, server: Upstream, given: RawKeys) -> None:
    """Report keys that mean nothing for what is one server, or several."""
    end = server.end
    if isinstance(end, Address) and end.is_service:
        for key in ("weight", "expand"):
            if key in given:
                what = f"{key} of {end}, whose SRV records say which servers there are"
                table.issues.error(given[key].place, what, hint="leave it out")
    elif "expand" in given and given["expand"].value and end.is_literal:
        what = f"expand of {end}, which is one address"
        hint = "leave it out, or write a name that has several addresses"
        table.issues.error(given["expand"].place, what, hint=hint)


def _group_of(text: str) -> str | None:
    return _word_behind(text, _GROUP)


def _word_behind(text: str, prefix: str) -> str | None:
    """What follows a prefix; None also if that is a port, for a host may be called so."""
    word = text.removeprefix(prefix)
    return None if word == text or PORTS.fullmatch(word) else word
