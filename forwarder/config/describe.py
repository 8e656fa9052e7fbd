"""What a configuration means, as lines for people. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.config.address import UnixAddress
from forwarder.config.address_checks import transport
from forwarder.config.check_values import Expected, show_bytes, show_expected
from forwarder.config.keys import OF_A_CHECK, OF_A_GROUP, OF_A_RULE, OF_A_SERVER
from forwarder.config.model import Check, Group, Limits, Rule, SocketOptions, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from forwarder.config.keys import Key
    from forwarder.config.model import Config
    from forwarder.config.raw import Value

# In the log at a start: enough to see what it is about. Arbitrary.
MOST_LISTED: Final = 20
_MOST_SHOWN: Final = 3
_MOST_OF_A_TEXT: Final = 40


def describe(config: Config, title: str) -> list[str]:
    """A line per fact; ``title`` is what the configuration is called."""
    settings = config.settings
    lines = [
        f"{title}: {plural(len(config.rules), 'rule')}, workers {settings.workers or 'auto'}, "
        f"relay {settings.relay.value}"
    ]
    lines += [f"global {rule.verdict.value} {rule.pattern}" for rule in config.access]
    lines += _groups(config)
    for rule in config.rules:
        there = f"group:{rule.group.name}" if rule.group.name else _servers(rule.upstreams)
        lines.append(f"{label(rule, ': ')}{_way(rule, there)}{_unusual(rule)}")
        lines += [f"{rule.name}: {entry.verdict.value} {entry.pattern}" for entry in rule.access]
    return lines


def _groups(config: Config) -> Iterator[str]:
    """What the groups are that rules share."""
    shared = {rule.group.name: rule for rule in config.rules if rule.group.name}
    for name, rule in shared.items():
        yield f"group:{name}: {_servers(rule.upstreams)}{_of_group(rule.group)}"


def way(rule: Rule, most: int | None = None) -> str:
    """What a rule forwards: protocol, where it listens, where it leads, to ``most`` of them."""
    servers = _servers(rule.upstreams, most)
    return _way(rule, f"group:{rule.group.name} ({servers})" if rule.group.name else servers)


def _way(rule: Rule, there: str) -> str:
    return f"{rule.protocol.value} {rule.listen} -> {there}"


def _servers(upstreams: Sequence[Upstream], most: int | None = None) -> str:
    text = ", ".join(map(server, upstreams[:most]))
    if most is not None and len(upstreams) > most:
        text += f" and {len(upstreams) - most} more"
    return text


def server(upstream: Upstream) -> str:
    """An upstream, and in brackets what of it is not as usual."""
    said = ", ".join(_said(OF_A_SERVER, {Upstream: upstream}))
    return f"{upstream} ({said})" if said else str(upstream)


def check(found: Check) -> str:
    """How servers are checked, as far as it is not as usual."""
    parts = [found.kind.value]
    if found.send:
        parts.append(f"send {_short(show_bytes(found.send))}")
    if found.expect:
        parts.append(f"expect {_short(show_expected(Expected(found.expect, found.is_pattern)))}")
    return ", ".join([*parts, *_said(OF_A_CHECK, {Check: found})])


def _short(text: str) -> str:
    return text if len(text) <= _MOST_OF_A_TEXT else f"{text[:_MOST_OF_A_TEXT]}..."


def _of_group(group: Group) -> str:
    """What of a group is not as usual, and its check."""
    said = [*_said(OF_A_GROUP, {Group: group})]
    if group.check:
        said.append(f"check ({check(group.check)})")
    return "".join(f", {text}" for text in said)


def listening(rules: Sequence[Rule], state_of: Callable[[Rule], str]) -> list[str]:
    """A line for each rule, up to a number, as the log has them at a start.

    ``state_of`` says whether it is listening, partly listening or waiting.
    """
    lines = [
        f"{state_of(rule)} {label(rule, ' ')}{way(rule, _MOST_SHOWN)}"
        for rule in rules[:MOST_LISTED]
    ]
    if len(rules) > MOST_LISTED:
        lines.append(f"listening and {plural(len(rules) - MOST_LISTED, 'more rule')}")
    return lines


def waiting_text(names: Sequence[str]) -> str:
    """What follows a report if some rules wait for their address."""
    if not names:
        return ""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"; waiting for an address: {', '.join(names[:_MOST_SHOWN])}{more}"


def label(rule: Rule, end: str) -> str:
    """The name of a rule and ``end``; nothing where the name is only made of its address."""
    is_made = rule.name == f"{transport(rule.protocol)} {rule.listen}"
    return "" if is_made else f"{rule.name}{end}"


def plural(count: int, word: str) -> str:
    """A number of things."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _unusual(rule: Rule) -> str:
    """What of a rule is not as usual, and the permissions of its file."""
    has_file = isinstance(rule.listen, UnixAddress) and rule.listen.path.startswith("/")
    rows = {name: key for name, key in OF_A_RULE.items() if has_file or name != "mode"}
    parts = {Rule: rule, Limits: rule.limits, SocketOptions: rule.options}
    always = ("mode",) if has_file else ()
    said = "".join(f", {text}" for text in _said(rows, parts, always))
    return said if rule.group.name else said + _of_group(rule.group)


def _said(
    rows: Mapping[str, Key], parts: Mapping[type, object], always: Sequence[str] = ()
) -> Iterator[str]:
    """What is said of the values of parts of the model that are not the defaults."""
    for key in rows.values():
        if not key.said or key.of not in parts:
            continue
        value = getattr(parts[key.of], key.field)
        if key.name in always or value != key.default:
            yield key.said.format(_text(key.shown(value)))


def _text(value: Value) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return value.value if isinstance(value, Enum) else value
