"""TOML text to a RawConfig: a superset of oxidinetd's keys, which mean what they mean there.

Checks kinds and ranges of values and that a rule is complete; what concerns several rules is
checked for all dialects together, in ``resolve``.
"""

from __future__ import annotations

import re
import tomllib

from forwarder.config.keys import (
    AT_THE_TOP,
    DEFAULTS,
    OF_A_RULE,
    OF_CHECKS,
    read_keys,
    values_of,
)
from forwarder.config.model import AccessRule, LogFormat, LogPlace, Protocol, Settings, Verdict
from forwarder.config.raw import Issues, RawConfig, RawRule
from forwarder.config.toml_addresses import read_listen
from forwarder.config.toml_check import read_check
from forwarder.config.toml_limits import finish_limits
from forwarder.config.toml_places import Places
from forwarder.config.toml_table import Table
from forwarder.config.toml_upstreams import read_groups, read_upstreams
from forwarder.errors import Place

TOP_KEYS = tuple(
    sorted(
        (
            *AT_THE_TOP,
            *DEFAULTS,
            "checks",
            "forwarding_rules",
            "global_rules",
            "groups",
            "log_file",
            "log_format",
            "logs",
        )
    )
)
RULE_KEYS = tuple(
    sorted(
        (
            *OF_A_RULE,
            "bind_address",
            "bind_port",
            "check",
            "connect_address",
            "connect_port",
            "listen",
            "name",
            "protocol",
            "rules",
            "upstream",
        )
    )
)
ACCESS_KEYS = ("type", "pattern")
LOG_KEYS = ("to", "format")
LOG_PLACES = '"stderr", "syslog", "journal" or a path'

_POSITION = re.compile(r" \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)$")
_EXAMPLE = '[[forwarding_rules]] with listen = "0.0.0.0:8080" and upstream = "10.0.0.1:80"'
_SYNTAX_HINTS = {
    "Cannot overwrite a value": "a key or table is written twice",
    "Cannot declare": "a table is written twice; an array of tables needs double brackets",
    "Invalid value": 'texts need quotes: key = "value"',
    "Expected '=' after a key": "a line is KEY = VALUE, a [table] or a # comment",
}


def parse(text: str, source: str, issues: Issues) -> RawConfig:
    """Read a whole file. Problems go to ``issues``; valid parts are still returned."""
    data: dict[str, object]
    try:
        data = tomllib.loads(text)
    except RecursionError:
        issues.error(Place(source), "the brackets of a value are nested too deep")
        return RawConfig(rules_seen=1)
    except ValueError as error:
        _report_syntax(str(error), text, source, issues)
        return RawConfig(rules_seen=1)
    top = Table(data, (), Places(text, source), issues, TOP_KEYS)
    raw = RawConfig(
        settings=_settings(top),
        access=_access(top, "global_rules"),
        defaults=read_keys(top, DEFAULTS),
    )
    read_groups(top, raw)
    rules = top.get("forwarding_rules")
    if rules is None:
        issues.error(
            Place(source),
            "forwarding_rules is missing",
            allowed="one or more",
            hint=f"add {_EXAMPLE}",
        )
    raw.rules_seen = 0 if rules == [] else 1
    for table in top.tables("forwarding_rules", RULE_KEYS):
        rule = _rule(table, raw)
        if rule is not None:
            raw.rules.append(rule)
    return raw


def _report_syntax(message: str, text: str, source: str, issues: Issues) -> None:
    position = _POSITION.search(message)
    if position is None:
        place = Place(source)
    elif position[1] is None:
        place = Place(source, text.count("\n") + 1)
    else:
        place = Place(source, int(position[1]), int(position[2]))
    what = message[: position.start()] if position else message
    hint = next((hint for start, hint in _SYNTAX_HINTS.items() if what.startswith(start)), "")
    issues.error(place, f"not valid TOML: {what[:1].lower()}{what[1:]}", hint=hint)


def _settings(top: Table) -> Settings:
    fields = values_of(Settings, read_keys(top, AT_THE_TOP), AT_THE_TOP)
    checks = top.table("checks", tuple(OF_CHECKS), "a table: [checks]")
    if checks:
        fields |= values_of(Settings, read_keys(checks, OF_CHECKS), OF_CHECKS)
    return Settings(logs=_logs(top), **fields)  # type: ignore[arg-type]  # as each is read


def _logs(top: Table) -> tuple[LogPlace, ...]:
    """The connection log: oxidinetd's two keys are one place, [[logs]] any number."""
    places = []
    log_file = top.text("log_file")
    log_format = top.choice("log_format", LogFormat)
    if log_file:
        how = log_format.value if log_format else LogFormat.RINETD
        places.append(LogPlace(to=log_file.value, format=how, place=log_file.place))
    elif log_format:
        top.issues.warn(
            top.place("log_format"),
            "log_format has no effect without log_file",
            hint="[[logs]] has a format of its own",
        )
    for entry in top.tables("logs", LOG_KEYS):
        to = entry.text("to", LOG_PLACES)
        if "to" not in entry:
            entry.issues.error(entry.place(), "an entry of logs lacks to", allowed=LOG_PLACES)
        written = entry.choice("format", LogFormat)
        if to:
            how = written.value if written else LogFormat.JSON
            places.append(LogPlace(to=to.value, format=how, place=to.place))
    _check_logs(places, top.issues)
    return tuple(places)


def _check_logs(places: list[LogPlace], issues: Issues) -> None:
    first: dict[str, LogPlace] = {}
    for place in places:
        other = first.setdefault(place.to, place)
        if other is not place:
            issues.error(
                place.place,
                f"the connection log goes to {place.to} already, at {other.place}",
                hint="give each place one entry",
            )


def _access(table: Table, key: str) -> list[AccessRule]:
    rules = []
    for entry in table.tables(key, ACCESS_KEYS):
        for required in ACCESS_KEYS:
            if required not in entry:
                entry.issues.error(
                    entry.place(),
                    f"an access rule lacks {required}",
                    allowed='type = "allow" or "deny", pattern = "PATTERN"',
                )
        verdict = entry.choice("type", Verdict)
        pattern = entry.text("pattern")
        if verdict and pattern:
            rules.append(
                AccessRule(verdict=verdict.value, pattern=pattern.value, place=pattern.place)
            )
    return rules


def _rule(table: Table, raw: RawConfig) -> RawRule | None:
    """Read one rule; None when it has no usable listen address or upstream."""
    listen = read_listen(table)
    upstreams, group = read_upstreams(table)
    if group:
        raw.led_to.add(group.value)
    found = table.choice("protocol", Protocol)
    protocol = found.value if found else Protocol.TCP
    name = table.text("name")
    keys, check = read_keys(table, OF_A_RULE), read_check(table)
    finish_limits(
        table, keys, is_udp=protocol.listens_on_udp, has_total=bool(raw.settings.max_sessions)
    )
    access = _access(table, "rules")
    if listen is None or not (upstreams or group):
        raw.dropped_access += access
        return None
    return RawRule(
        place=table.place(),
        listen=listen,
        upstreams=upstreams,
        leads_to=group,
        check=check,
        protocol=protocol,
        name=name,
        keys=keys,
        access=access,
    )
