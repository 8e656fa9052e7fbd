"""What a reload changes: a pure comparison of two configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from forwarder.config.model import Config

# What is read once, by a process that a reload does not start again.
FIXED_SETTINGS: Final = ("relay", "user", "group", "pid_file", "control")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadPlan:
    """Names of the rules that come, go, change and stay."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"+{len(self.added)} -{len(self.removed)} ~{len(self.changed)} "
            f"={len(self.unchanged)} rules"
        )


def diff(old: Config, new: Config) -> ReloadPlan:
    """Compare two configurations rule by rule. A change of the global access changes every rule."""
    before = {rule.name: rule for rule in old.rules}
    after = {rule.name: rule for rule in new.rules}
    is_open_alike = old.access == new.access
    kept = [name for name in after if name in before]
    unchanged = {name for name in kept if is_open_alike and before[name] == after[name]}
    return ReloadPlan(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(name for name in kept if name not in unchanged),
        unchanged=tuple(name for name in kept if name in unchanged),
    )
