"""TOML text to a RawConfig: a superset of oxidinetd's keys, which mean what they mean there.

Checks kinds and ranges of values and that a rule is complete; what concerns several rules is
checked for all dialects together, in ``resolve``.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace

from forwarder.config.model import (
    HANG_TIMEOUT_S,
    MAX_WORKERS,
    AccessRule,
    Answers,
    BindPolicy,
    Framing,
    LogFormat,
    LogPlace,
    Protocol,
    RelayMode,
    Settings,
    Verdict,
)
from forwarder.config.raw import Issues, Placed, RawConfig, RawRule
from forwarder.config.toml_addresses import read_host, read_listen, read_upstreams
from forwarder.config.toml_limits import LIMIT_KEYS, MOST_SESSIONS, read_limits
from forwarder.config.toml_places import Places
from forwarder.config.toml_table import Table
from forwarder.config.toml_values import DEFAULT_KEYS, OPTION_KEYS, read_options
from forwarder.errors import Place

# A worker gives a sign of life every second.
MIN_HANG_TIMEOUT_S = 3.0
# Each flow has one or two descriptors, of which Linux gives a process at most 2^20 unless told to.
MOST_FLOWS = 1 << 20

TOP_KEYS = tuple(
    sorted(
        (
            *DEFAULT_KEYS,
            "bind",
            "connect_timeout",
            "control",
            "cut_denied",
            "drain_timeout",
            "forwarding_rules",
            "global_rules",
            "group",
            "half_close_timeout",
            "hang_timeout",
            "idle_timeout",
            "log_file",
            "log_format",
            "logs",
            "max_sessions",
            "pid_file",
            "relay",
            "user",
            "workers",
        )
    )
)
RULE_KEYS = tuple(
    sorted(
        (
            *LIMIT_KEYS,
            *OPTION_KEYS,
            "answers",
            "bind",
            "bind_address",
            "bind_port",
            "connect_address",
            "connect_port",
            "connect_timeout",
            "framing",
            "half_close_timeout",
            "idle_timeout",
            "listen",
            "max_flows",
            "mode",
            "name",
            "protocol",
            "rules",
            "source_address",
            "timeout",
            "upstream",
        )
    )
)
ACCESS_KEYS = ("type", "pattern")
LOG_KEYS = ("to", "format")
LOG_PLACES = '"stderr", "syslog", "journal" or a path'

_POSITION = re.compile(r" \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)$")
_MODE = re.compile(r"0?[0-7]{3}")
_EXAMPLE = '[[forwarding_rules]] with listen = "0.0.0.0:8080" and upstream = "10.0.0.1:80"'
_SYNTAX_HINTS = {
    "Cannot overwrite a value": "a key or table is written twice",
    "Cannot declare": "a table is written twice; an array of tables needs double brackets",
    "Invalid value": 'texts need quotes: key = "value"',
    "Expected '=' after a key": "a line is KEY = VALUE, a [table] or a # comment",
}


def parse(text: str, source: str, issues: Issues) -> RawConfig:
    """Read a whole file. Problems go to ``issues``; what is sound is returned all the same."""
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
    raw = RawConfig(settings=_settings(top), access=_access(top, "global_rules"))
    for key in ("connect_timeout", "half_close_timeout", "idle_timeout"):
        duration = top.duration(key)
        if duration is not None:
            setattr(raw, f"{key}_s", duration.value)
    raw.bind = top.choice("bind", BindPolicy) or raw.bind
    raw.options = read_options(top, DEFAULT_KEYS)
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
    pid_file = top.text("pid_file")
    control = top.text("control")
    user = top.text("user")
    group = top.text("group")
    drain_timeout = top.duration("drain_timeout")
    settings = Settings(
        workers=_workers(top),
        logs=_logs(top),
        max_sessions=_max_sessions(top),
        pid_file=pid_file.value if pid_file else None,
        control=control.value if control else None,
        user=user.value if user else None,
        group=group.value if group else None,
        drain_timeout_s=drain_timeout.value if drain_timeout else None,
        hang_timeout_s=_hang_timeout(top),
        cut_denied=_cut_denied(top),
    )
    return replace(settings, relay=top.choice("relay", RelayMode) or settings.relay)


def _cut_denied(top: Table) -> bool:
    found = top.flag("cut_denied")
    return found is not None and found.value


def _max_sessions(top: Table) -> int:
    found = top.number("max_sessions", 1, MOST_SESSIONS)
    return found.value if found else 0


def _logs(top: Table) -> tuple[LogPlace, ...]:
    """The connection log: oxidinetd's two keys are one place, [[logs]] any number."""
    places = []
    log_file = top.text("log_file")
    log_format = top.choice("log_format", LogFormat)
    if log_file:
        how = log_format or LogFormat.RINETD
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
        how = entry.choice("format", LogFormat) or LogFormat.JSON
        if to:
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


def _hang_timeout(top: Table) -> float:
    """Seconds; fewer than a few of a worker's signs of life would kill healthy ones."""
    found = top.duration("hang_timeout")
    if found is None:
        return HANG_TIMEOUT_S
    if found.value < MIN_HANG_TIMEOUT_S:
        top.bad("hang_timeout", f"at least {MIN_HANG_TIMEOUT_S:.0f} seconds")
    return found.value


def _workers(top: Table) -> int:
    value = top.get("workers")
    if value is None or value == "auto":
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WORKERS:
        return value
    hint = 'write "auto" for one per CPU' if value == 0 else ""
    top.bad("workers", f'"auto" or a number from 1 to {MAX_WORKERS}', hint)
    return 0


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
            rules.append(AccessRule(verdict=verdict, pattern=pattern.value, place=pattern.place))
    return rules


def _rule(table: Table, raw: RawConfig) -> RawRule | None:
    """Read one rule; None when it has no usable listen address or upstream."""
    listen = read_listen(table)
    upstreams = read_upstreams(table)
    protocol = table.choice("protocol", Protocol) or Protocol.TCP
    framing = table.choice("framing", Framing)
    answers = table.choice("answers", Answers)
    bind = table.choice("bind", BindPolicy)
    name = table.text("name")
    source = read_host(table, "source_address")
    udp_timeout_s = table.duration("timeout")
    max_flows = table.number("max_flows", 1, MOST_FLOWS)
    unix_mode = _mode(table)
    options = read_options(table, OPTION_KEYS)
    durations = {
        f"{key}_s": duration.value
        for key in ("connect_timeout", "half_close_timeout", "idle_timeout")
        if (duration := table.duration(key)) is not None
    }
    limits = read_limits(
        table, is_udp=protocol.listens_on_udp, has_total=bool(raw.settings.max_sessions)
    )
    access = _access(table, "rules")
    if listen is None or not upstreams:
        raw.dropped_access += access
        return None
    return RawRule(
        place=table.place(),
        listen=listen,
        upstreams=upstreams,
        protocol=protocol,
        name=name,
        source=source,
        udp_timeout_s=udp_timeout_s,
        max_flows=max_flows,
        framing=Placed(framing, table.place("framing")) if framing else None,
        answers=Placed(answers, table.place("answers")) if answers else None,
        unix_mode=unix_mode,
        bind=bind,
        limits=limits,
        options=options,
        access=access,
        **durations,
    )


def _mode(table: Table) -> Placed[int] | None:
    """Read permissions, which are a text: TOML does not tell whether a number was octal."""
    value = table.get("mode")
    if value is None:
        return None
    if isinstance(value, str) and _MODE.fullmatch(value):
        return Placed(int(value, 8), table.place("mode"))
    hint = "write it in quotes" if isinstance(value, int) else ""
    table.bad("mode", 'permissions as octal digits, "0000" to "0777", such as "0660"', hint)
    return None
