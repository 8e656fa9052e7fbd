"""RawConfig to Config: defaults, names, and the checks of what is not an address.

Pure. What addresses may be, alone and together, is checked in ``address_checks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.config.address_checks import check_endpoints, check_listeners, transport
from forwarder.config.groups import Groups
from forwarder.config.keys import OF_A_RULE, values_of
from forwarder.config.model import (
    UDP_TIMEOUT_S,
    AccessRule,
    Answers,
    Config,
    Framing,
    Limits,
    Protocol,
    Rule,
    SocketOptions,
)
from forwarder.config.option_checks import Kinds, check_options
from forwarder.config.patterns import PATTERN_FORMS, PatternError, parse_pattern
from forwarder.errors import Place

if TYPE_CHECKING:
    from forwarder.config.model import Group
    from forwarder.config.raw import Issues, RawConfig, RawKeys, RawRule

MAX_NAME_LENGTH = 100


def resolve(raw: RawConfig, source: str, issues: Issues) -> Config:
    """Return the finished configuration; it is good only if ``issues`` holds no error."""
    if not raw.rules_seen and raw.may_lack_rules:
        issues.warn(
            Place(source),
            "there is no forwarding rule, so nothing is forwarded",
            hint="add one and reload",
        )
    elif not raw.rules_seen:
        issues.error(
            Place(source),
            "there is no forwarding rule",
            allowed="one or more",
            hint="add one; a configuration without rules would do nothing",
        )
    _check_access(raw.access, issues)
    _check_access(raw.dropped_access, issues)
    check_listeners(raw.rules, issues)
    names = _Names(issues)
    for rule in raw.rules:
        _check_access(rule.access, issues)
        names.claim(rule)
    groups = Groups(raw, issues)
    rules = tuple(
        _finish(rule, names.name_of(rule), groups.of(rule), raw, issues) for rule in groups.rules
    )
    groups.check_names(rules)
    return Config(rules=rules, access=tuple(raw.access), settings=raw.settings)


def _finish(rule: RawRule, name: str, group: Group, raw: RawConfig, issues: Issues) -> Rule:
    check_endpoints(rule, issues)
    _check_udp_timeout(rule, issues)
    made = _made(rule, name, group, raw.defaults)
    _check_datagram_keys(rule, made, issues)
    check_options(rule, made.options, issues)
    return made


def _made(rule: RawRule, name: str, group: Group, defaults: RawKeys) -> Rule:
    """The rule with ``defaults`` for the keys that it has not itself.

    Not with those that do nothing there: a change of one would be a change of the rule.
    """
    kinds = Kinds(rule)
    given = {key: placed for key, placed in defaults.items() if kinds.have(OF_A_RULE[key].sockets)}
    given |= rule.keys
    places = tuple(
        (key, placed.place) for key, placed in given.items() if OF_A_RULE[key].of is SocketOptions
    )
    # Each reader gives what its field holds.
    options = SocketOptions(**values_of(SocketOptions, given, OF_A_RULE), places=places)  # type: ignore[arg-type]
    limits = Limits(**values_of(Limits, given, OF_A_RULE))  # type: ignore[arg-type]
    return Rule(
        name=name,
        listen=rule.listen.value,
        upstreams=tuple(upstream.value for upstream in rule.upstreams),
        group=group,
        protocol=rule.protocol,
        access=tuple(rule.access),
        limits=limits,
        options=options,
        place=rule.place,
        **values_of(Rule, given, OF_A_RULE),  # type: ignore[arg-type]
    )


class _Names:
    """Gives each rule a name of its own; names that were written come first."""

    def __init__(self, issues: Issues) -> None:
        self._issues = issues
        self._taken: dict[str, Place] = {}

    def claim(self, rule: RawRule) -> None:
        """Note a written name; a second rule of that name is an error."""
        if rule.name is None:
            return
        name, place = rule.name.value, rule.name.place
        if len(name) > MAX_NAME_LENGTH:
            self._issues.error(
                place,
                f"name has {len(name)} characters",
                allowed=f"1 to {MAX_NAME_LENGTH} characters",
            )
        first = self._taken.setdefault(name, place)
        if first is not place:
            self._issues.error(
                place,
                f"the name {name[:MAX_NAME_LENGTH]!r} is taken by the rule at {first}",
                hint="give each rule a name of its own, or none",
            )

    def name_of(self, rule: RawRule) -> str:
        """Return the written name, or one made from the listen address.

        It depends on nothing else, so that a rule keeps its name when other rules come and go.
        """
        if rule.name is not None:
            return rule.name.value
        name = f"{transport(rule.protocol)} {rule.listen.value}"
        while name in self._taken:
            name += "'"
        self._taken[name] = rule.place
        return name


def _check_access(rules: list[AccessRule], issues: Issues) -> None:
    for rule in rules:
        try:
            parse_pattern(rule.pattern)
        except PatternError as error:
            what = f"{rule.verdict.value} pattern {error}"
            issues.error(rule.place, what, allowed=PATTERN_FORMS, hint=error.hint)


def _check_udp_timeout(rule: RawRule, issues: Issues) -> None:
    timeout = rule.keys.get("timeout")
    if timeout is None:
        return
    if rule.protocol is Protocol.TCP:
        issues.warn(
            timeout.place,
            "timeout has no effect on a TCP rule: it ends silent UDP flows",
            hint="the TOML format has idle_timeout for TCP",
        )
    elif timeout.value == 0:
        issues.warn(
            timeout.place,
            "timeout 0 keeps UDP flows open forever, and with them two sockets each",
            hint=f"leave it out for {UDP_TIMEOUT_S:g} s",
        )


def _check_datagram_keys(rule: RawRule, made: Rule, issues: Issues) -> None:
    max_flows, framing = rule.keys.get("max_flows"), rule.keys.get("framing")
    if max_flows is not None and rule.protocol is Protocol.TCP:
        issues.warn(
            max_flows.place,
            "max_flows has no effect on a TCP rule: it bounds UDP flows",
            hint="leave it out",
        )
    is_mixed = rule.protocol in (Protocol.UDP_TO_TCP, Protocol.TCP_TO_UDP)
    if framing is not None and not is_mixed:
        issues.error(
            framing.place,
            f"framing on a {rule.protocol.value} rule: it keeps datagrams apart on a TCP"
            " connection",
            allowed='framing where protocol is "udptotcp" or "tcptoudp"',
            hint="leave it out",
        )
    answers = rule.keys.get("answers")
    if answers is not None and made.answers is not Answers.MANY:
        _check_answers(made, answers.place, issues)


def _check_answers(rule: Rule, place: Place, issues: Issues) -> None:
    """In a stream only framing shows where an answer ends, and a stream has one port."""
    key = f'answers = "{rule.answers.value}"'
    is_one = rule.answers is Answers.ONE
    if rule.protocol is Protocol.UDP:
        return
    if rule.protocol is Protocol.UDP_TO_TCP and is_one:
        if rule.framing is not Framing.LENGTH:
            issues.error(
                place,
                f"{key} without framing: nothing shows where an answer ends",
                hint='add framing = "length"',
            )
        return
    allowed = '"udp", or "udptotcp" with framing = "length"' if is_one else '"udp"'
    issues.error(
        place,
        f"{key} on a {rule.protocol.value} rule",
        allowed=f"{key} where protocol is {allowed}",
        hint="leave it out",
    )
