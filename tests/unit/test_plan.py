"""What a reload changes, rule by rule, as properties of any two configurations."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.address import Address
from forwarder.config.model import AccessRule, Config, Rule, Settings, Upstream, Verdict
from forwarder.config.plan import diff
from forwarder.errors import Place

ACCESS = st.lists(
    st.builds(
        AccessRule,
        verdict=st.sampled_from(Verdict),
        pattern=st.sampled_from(["10.*", "192.0.2.1"]),
        place=st.builds(Place, st.just("file"), st.integers(1, 9)),
    ),
    max_size=2,
).map(tuple)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A few rules of few names, so that two configurations have some in common."""
    names = draw(st.lists(st.sampled_from("abcdef"), unique=True))
    rules = tuple(
        Rule(
            name=name,
            listen=Address("127.0.0.1", draw(st.integers(1, 2))),
            upstreams=(Upstream(Address("127.0.0.1", draw(st.integers(1, 2)))),),
            access=draw(ACCESS),
            place=Place("file", draw(st.integers(1, 99))),
        )
        for name in names
    )
    return Config(rules=rules, access=draw(ACCESS))


def names(config: Config) -> set[str]:
    return {rule.name for rule in config.rules}


@given(configs(), configs())
def test_every_rule_is_in_exactly_one_group(old: Config, new: Config) -> None:
    plan = diff(old, new)
    assert set(plan.added) == names(new) - names(old)
    assert set(plan.removed) == names(old) - names(new)
    assert sorted(plan.changed + plan.unchanged) == sorted(names(old) & names(new))


@given(configs(), configs())
def test_the_way_back_is_the_opposite(old: Config, new: Config) -> None:
    there, back = diff(old, new), diff(new, old)
    assert set(there.added) == set(back.removed)
    assert set(there.removed) == set(back.added)
    assert set(there.changed) == set(back.changed)
    assert set(there.unchanged) == set(back.unchanged)


@given(configs(), st.randoms())
def test_neither_order_nor_place_nor_a_setting_changes_a_rule(
    config: Config, random: object
) -> None:
    rules = [dataclasses.replace(rule, place=Place("other", 7)) for rule in config.rules]
    random.shuffle(rules)  # type: ignore[attr-defined]  # a random.Random
    moved = Config(rules=tuple(rules), access=config.access, settings=Settings(workers=7))
    plan = diff(config, moved)
    assert set(plan.unchanged) == names(config)
    assert plan.added == plan.removed == plan.changed == ()


@given(configs())
def test_a_change_of_the_global_access_changes_every_rule(config: Config) -> None:
    entry = AccessRule(verdict=Verdict.DENY, pattern="198.51.100.*", place=Place("file"))
    plan = diff(config, dataclasses.replace(config, access=(*config.access, entry)))
    assert set(plan.changed) == names(config)


def test_it_is_told_in_a_line() -> None:
    def rule(name: str, port: int) -> Rule:
        address = Address("127.0.0.1", port)
        return Rule(name=name, listen=address, upstreams=(Upstream(address),), place=Place("file"))

    old = Config(rules=(rule("gone", 1), rule("changed", 2), rule("same", 3)))
    new = Config(rules=(rule("same", 3), rule("changed", 9), rule("new", 4), rule("newer", 5)))
    assert str(diff(old, new)) == "+2 -1 ~1 =1 rules"
