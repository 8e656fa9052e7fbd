"""What a configuration means, as lines for people. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.config.address import UnixAddress
from forwarder.config.address_checks import transport
from forwarder.config.keys import OF_A_RULE
from forwarder.config.model import Limits, Rule, SocketOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forwarder.config.model import Config
    from forwarder.config.raw import Value

# In the log at a start: enough to see what it is about. Arbitrary.
MOST_LISTED: Final = 20
_MOST_SHOWN: Final = 3


def describe(config: Config, title: str) -> list[str]:
    """A line per fact; ``title`` is what the configuration is called."""
    settings = config.settings
    lines = [
        f"{title}: {plural(len(config.rules), 'rule')}, workers {settings.workers or 'auto'}, "
        f"relay {settings.relay.value}"
    ]
    lines += [f"global {rule.verdict.value} {rule.pattern}" for rule in config.access]
    for rule in config.rules:
        lines.append(f"{label(rule, ': ')}{way(rule)}{_unusual(rule)}")
        lines += [f"{rule.name}: {entry.verdict.value} {entry.pattern}" for entry in rule.access]
    return lines


def way(rule: Rule, most: int | None = None) -> str:
    """What a rule forwards: protocol, where it listens, where it leads, to ``most`` of them."""
    upstreams = ", ".join(map(str, rule.upstreams[:most]))
    if most is not None and len(rule.upstreams) > most:
        upstreams += f" and {len(rule.upstreams) - most} more"
    return f"{rule.protocol.value} {rule.listen} -> {upstreams}"


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
    parts = {Rule: rule, Limits: rule.limits, SocketOptions: rule.options}
    text = ""
    for key in OF_A_RULE.values():
        value = getattr(parts[key.of], key.field)
        is_told = has_file if key.name == "mode" else value != key.default
        if key.said and is_told:
            text += f", {key.said.format(_text(key.shown(value)))}"
    return text


def _text(value: Value) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value.value if isinstance(value, Enum) else value
