"""Groups as written to groups as they are: which rule leads to which, and what is wrong. Pure."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from forwarder.config import presets
from forwarder.config.group_checks import check_group
from forwarder.config.keys import OF_A_GROUP, values_of
from forwarder.config.model import CheckKind, Group
from forwarder.config.raw import Placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.config.model import Check, Rule, Upstream
    from forwarder.config.raw import Issues, RawCheck, RawConfig, RawGroup, RawKeys, RawRule

_ORDINARY: Final = Group()


class Groups:
    """The groups of one configuration. ``rules`` have their upstreams, whoever these are of."""

    def __init__(self, raw: RawConfig, issues: Issues) -> None:
        self._issues = issues
        self._raw = raw
        self._shared = self._by_name()
        self.rules = [led for rule in raw.rules if (led := self._led(rule))]
        by_udp = {
            rule.leads_to.value
            for rule in raw.rules
            if rule.leads_to and rule.protocol.connects_by_udp
        }
        self._made = {
            name: self._make(name, group.servers, group.keys, group.check, is_udp=name in by_udp)
            for name, group in self._shared.items()
        }

    def _by_name(self) -> dict[str, RawGroup]:
        found: dict[str, RawGroup] = {}
        for group in self._raw.groups:
            name = group.name.value
            first = found.setdefault(name, group)
            if first is not group:
                self._issues.error(
                    group.name.place,
                    f"the name {name!r} is taken by the group at {first.name.place}",
                    hint="give each group a name of its own",
                )
            elif name not in self._raw.led_to:
                self._issues.warn(
                    group.name.place,
                    f"no rule leads to the group {name!r}, so it does nothing",
                    hint=f'write upstream = "group:{name}" in a rule, or take the group out',
                )
        return found

    def _led(self, rule: RawRule) -> RawRule | None:
        """A rule with the servers of its group; None if there is no such group."""
        if rule.leads_to is None:
            return rule
        name, place = rule.leads_to.value, rule.leads_to.place
        group = self._shared.get(name)
        if group is None:
            if name not in self._raw.broken_groups:
                self._report_unknown(rule.leads_to)
            return None
        self._refuse_keys_of_groups(rule, name)
        # A server that does not go with the rule is reported there: others may use the group.
        upstreams = tuple(Placed(server.value, place) for server in group.servers)
        return replace(rule, upstreams=upstreams)

    def _report_unknown(self, name: Placed[str]) -> None:
        known = [*self._shared, *sorted(self._raw.broken_groups)]
        near = get_close_matches(name.value, known, 1)
        hint = f"did you mean group:{near[0]}?" if near else ""
        if not known:
            hint = f'add [[groups]] with name = "{name.value}" and servers'
        self._issues.error(
            name.place,
            f"there is no group {name.value!r}",
            allowed=", ".join(f"group:{one}" for one in known[:6]),
            hint=hint,
        )

    def _refuse_keys_of_groups(self, rule: RawRule, name: str) -> None:
        places = {key: placed.place for key, placed in rule.keys.items() if key in OF_A_GROUP}
        if rule.check:
            places["check"] = rule.check.place
        for key, place in places.items():
            self._issues.error(
                place,
                f"{key} on a rule that leads to the group {name!r}",
                allowed=f"{key} in the table of the group, or on a rule with upstreams of its own",
                hint="move it to [[groups]]",
            )

    def of(self, rule: RawRule) -> Group:
        """The group of one of ``rules``. Reports what is wrong with it; to be called once each."""
        if rule.leads_to is not None:
            return self._made[rule.leads_to.value]
        own = {key: placed for key, placed in rule.keys.items() if key in OF_A_GROUP}
        if not own and rule.check is None and len(rule.upstreams) == 1:
            return _ORDINARY  # of most rules, of which there may be ten thousand
        is_udp = rule.protocol.connects_by_udp
        return self._make("", rule.upstreams, own, rule.check, is_udp=is_udp)

    def _make(
        self,
        name: str,
        servers: Sequence[Placed[Upstream]],
        keys: RawKeys,
        check: RawCheck | None,
        *,
        is_udp: bool,
    ) -> Group:
        if check and check.check.kind is CheckKind.COMMAND and not self._raw.settings.runs_commands:
            self._issues.error(
                check.place,
                "a check runs a command, which this file does not allow",
                hint="add [checks] with commands = true, if all who write to the file may do so",
            )
        made = Group(
            name=name,
            check=_finished(check, is_udp=is_udp) if check else None,
            **values_of(Group, keys, OF_A_GROUP),  # type: ignore[arg-type]  # as each is read
        )
        check_group(made, servers, keys, check, self._issues)
        return made

    def check_names(self, rules: Sequence[Rule]) -> None:
        """A rule with servers of its own is a group by its name, which no other may have."""
        for rule in rules:
            shared = self._shared.get(rule.name)
            if shared and rule.is_balanced and not rule.group.name:
                self._issues.error(
                    rule.place,
                    f"the rule {rule.name!r} has upstreams of its own, and is called as the group"
                    f" at {shared.name.place}",
                    hint="give one of the two another name",
                )


def _finished(raw: RawCheck, *, is_udp: bool) -> Check:
    if not (raw.is_dns and is_udp):
        return raw.check
    asked = presets.dns(is_udp=True)
    return replace(raw.check, kind=asked.kind, send=asked.send, expect=asked.expect)
