"""What a dialect reads out of its text, before the checks that hold for every dialect.

Addresses and durations are already values; whatever a file may leave out is still None. Everything
that a later check may complain about carries its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from forwarder.config.model import AccessRule, Check, Protocol, Settings, Upstream
from forwarder.errors import ConfigError, Issue, Place

if TYPE_CHECKING:
    from forwarder.config.address import Endpoint

T_co = TypeVar("T_co", covariant=True)

# Bounds the memory and the output that a file of another kind, given by mistake, can cost.
MAX_ISSUES = 1000


@dataclass(frozen=True, slots=True)
class Placed(Generic[T_co]):
    """A value and where it stands."""

    value: T_co
    place: Place


Value: TypeAlias = (
    bool
    | int
    | float
    | str
    | Enum
    | tuple[str, ...]
    | tuple[int, int]
    | tuple[tuple[int, int], ...]
)
RawKeys: TypeAlias = dict[str, Placed[Value]]
"""Values by key, as in the documentation; ``keys`` has what there may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCheck:
    """A check as written. ``is_dns``: by UDP or TCP, whatever the rules have.

    ``is_broken``: there is one, and what is wrong with it has been reported.
    """

    check: Check
    place: Place
    is_dns: bool = False
    is_broken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RawGroup:
    """One group that rules share, as written."""

    place: Place
    name: Placed[str]
    servers: tuple[Placed[Upstream], ...]
    keys: RawKeys = field(default_factory=dict)
    check: RawCheck | None = None


@dataclass(slots=True, kw_only=True)
class RawRule:
    """One rule as written: ``keys`` are those that have one value each.

    ``leads_to`` is the name of a group, in which case ``upstreams`` is empty until it is resolved.
    ``access`` grows while the lines behind a rinetd rule are read.
    """

    place: Place
    listen: Placed[Endpoint]
    upstreams: tuple[Placed[Upstream], ...]
    leads_to: Placed[str] | None = None
    check: RawCheck | None = None
    protocol: Protocol = Protocol.TCP
    name: Placed[str] | None = None
    keys: RawKeys = field(default_factory=dict)
    access: list[AccessRule] = field(default_factory=list)

    def put(self, key: str, value: Placed[Value] | None) -> None:
        """Give the rule a key; None leaves it as it is."""
        if value is not None:
            self.keys[key] = value

    @property
    def upstream_ends(self) -> tuple[Placed[Endpoint], ...]:
        """The addresses of the upstreams, where nothing else of them counts."""
        return tuple(Placed(upstream.value.end, upstream.place) for upstream in self.upstreams)


@dataclass(slots=True, kw_only=True)
class RawConfig:
    """A file as written; ``defaults`` are keys of its rules.

    ``rules_seen`` counts the rules begun, those with errors included: a file whose only rule is
    broken does not lack one. For the same reason ``broken_groups`` are the names of groups with
    errors, and ``led_to`` those of the groups of all rules. ``dropped_access`` holds the access
    rules of broken rules: they are checked, because all problems are reported at once, and dropped.
    """

    rules: list[RawRule] = field(default_factory=list)
    groups: list[RawGroup] = field(default_factory=list)
    broken_groups: set[str] = field(default_factory=set)
    led_to: set[str] = field(default_factory=set)
    rules_seen: int = 0
    may_lack_rules: bool = False
    access: list[AccessRule] = field(default_factory=list)
    dropped_access: list[AccessRule] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    defaults: RawKeys = field(default_factory=dict)


class Issues:
    """Collects the problems of one file, so that all of them are reported at once."""

    def __init__(self) -> None:
        self._issues: list[Issue] = []
        self._left_out = 0
        self._has_errors = False

    def error(self, place: Place, what: str, *, allowed: str = "", hint: str = "") -> None:
        """Note a problem that makes the configuration unusable."""
        self._add(Issue(place, what, allowed, hint))

    def warn(self, place: Place, what: str, *, hint: str = "") -> None:
        """Note something that is allowed and probably not meant."""
        self._add(Issue(place, what, hint=hint, is_warning=True))

    def _add(self, issue: Issue) -> None:
        if len(self._issues) >= MAX_ISSUES:
            self._left_out += 1
            # The one error that decides must not be lost behind a thousand warnings.
            if issue.is_warning or self._has_errors:
                return
        self._has_errors |= not issue.is_warning
        self._issues.append(issue)

    def finish(self) -> tuple[Issue, ...]:
        """Return the warnings, by place. Raises ConfigError with everything if there are errors."""
        issues = sorted(self._issues, key=lambda issue: (issue.place.line, issue.place.column))
        if self._left_out and issues:
            last = replace(issues[-1].place, column=0)
            issues.append(Issue(last, f"{self._left_out} more problems", is_warning=True))
        if self._has_errors:
            raise ConfigError(issues)
        return tuple(issues)
