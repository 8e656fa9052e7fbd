"""What differs between two configurations, key by key, in the words of the TOML format. Pure.

Which rules a reload leaves alone is decided in ``plan``; this is for people who want to know why.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address, UnixAddress
from forwarder.config.describe import check, label, server, way
from forwarder.config.keys import key_of
from forwarder.config.model import AccessRule, Check, LogPlace, Rule, Upstream
from forwarder.config.plan import FIXED_SETTINGS, ReloadPlan, diff

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.config.model import Config, Settings

# Of fields that several keys make together, those that are called otherwise in the format.
_KEYS: Final = {"access": "rules", "upstreams": "upstream"}
# What is one value in the format, or none.
_VALUES: Final = (Address, UnixAddress, Check)
# Settings in a table of their own.
_TABLES: Final = {"commands": "checks.commands"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key whose value is another one, and both values as text."""

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key} {self.old} -> {self.new}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a reload would do: the plan, why rules are changed, and what else is set otherwise.

    ``rules`` has the changed rules by name; ``settings`` the keys of the top level.
    """

    plan: ReloadPlan
    rules: dict[str, tuple[Change, ...]]
    settings: tuple[Change, ...]

    @property
    def is_same(self) -> bool:
        """Whether a reload would change nothing."""
        plan = self.plan
        return not (plan.added or plan.removed or plan.changed or self.settings)

    @property
    def needs_restart(self) -> tuple[str, ...]:
        """Settings that a reload leaves as they are."""
        return tuple(change.key for change in self.settings if change.key in FIXED_SETTINGS)


def compare(old: Config, new: Config) -> Comparison:
    """Compare two configurations."""
    plan = diff(old, new)
    before = {rule.name: rule for rule in old.rules}
    after = {rule.name: rule for rule in new.rules}
    settings = list(_changes(old.settings, new.settings))
    if old.access != new.access:
        change = Change(key="global_rules", old=as_text(old.access), new=as_text(new.access))
        settings.append(change)
    return Comparison(
        plan=plan,
        rules={name: tuple(_changes(before[name], after[name])) for name in plan.changed},
        settings=tuple(settings),
    )


def as_lines(found: Comparison, new: Config, *, shows_all: bool) -> list[str]:
    """For people, ``new`` being the later configuration; rules that stay only if all are shown."""
    plan = found.plan
    added = set(plan.added)
    lines = [f"+ {label(rule, ': ')}{way(rule)}" for rule in new.rules if rule.name in added]
    lines += [f"- {name}" for name in plan.removed]
    for name, changes in found.rules.items():
        lines.append(f"~ {name}")
        lines += [f"    {change}" for change in changes]
    lines += [f"= {name}" for name in plan.unchanged] if shows_all else []
    for change in found.settings:
        late = "; takes effect at the next start or upgrade"
        lines.append(f"{change}{late if change.key in found.needs_restart else ''}")
    return [*lines, str(plan)]


def as_object(found: Comparison) -> dict[str, object]:
    """For programs."""

    def pairs(changes: tuple[Change, ...]) -> dict[str, list[str]]:
        return {change.key: [change.old, change.new] for change in changes}

    return {
        "same": found.is_same,
        "added": found.plan.added,
        "removed": found.plan.removed,
        "changed": {name: pairs(changes) for name, changes in found.rules.items()},
        "unchanged": found.plan.unchanged,
        "settings": pairs(found.settings),
        "needs_restart": found.needs_restart,
    }


def _changes(old: Rule | Settings, new: Rule | Settings) -> Iterator[Change]:
    before, after = dict(values(old)), dict(values(new))
    for key, value in after.items():
        if before[key] != value:
            yield Change(key=key, old=before[key], new=value)


def values(thing: object) -> Iterator[tuple[str, str]]:
    """Keys and values of a rule or of the settings; what is nested is one level in the format."""
    if not dataclasses.is_dataclass(thing):
        return
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if not field.compare or field.name == "name":
            continue
        if isinstance(thing, Rule) and field.name == "upstreams" and thing.group.name:
            yield "upstream", f"group:{thing.group.name} ({as_text(value)})"
        elif dataclasses.is_dataclass(value) and not isinstance(value, _VALUES):
            yield from values(value)
        elif key := key_of(type(thing), field.name):
            yield _TABLES.get(key.name, key.name), as_text(key.shown(value))
        else:
            yield _KEYS.get(field.name, field.name), as_text(value)


def as_text(value: object) -> str:
    """A value for people."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(as_text, value))
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, AccessRule):
        return f"{value.verdict.value} {value.pattern}"
    if isinstance(value, LogPlace):
        return f"{value.to} ({value.format.value})"
    if isinstance(value, Upstream | Check):
        return server(value) if isinstance(value, Upstream) else check(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.15g}" if isinstance(value, float) else str(value)
