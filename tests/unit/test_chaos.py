"""What a chaos run holds against a forwarder, and what it excuses."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import pytest
from chaos import acts, config, model
from chaos.model import Ability, Blow, Ending, Event, Loss
from chaos.wire import MOST, address_of, is_text, number_of, text
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.loading import parse
from forwarder.config.model import Dialect

DEATH = Event(Blow.DEATH, since=100.0, until=100.5, held=frozenset({7}))
ALL = frozenset(Ability)
NONE: frozenset[Ability] = frozenset()


def ending(**more: object) -> Ending:
    """A session that began long before the worker died, and was cut with it."""
    values = {"number": 7, "kind": "long", "began": 10.0, "greeted": 10.1, "ended": 100.3}
    return Ending(**{**values, "outcome": model.CUT, **more})  # type: ignore[arg-type]


def why(it: Ending, abilities: frozenset[Ability] = NONE, event: Event = DEATH) -> str:
    return model.why_lost(Loss(it), [event], abilities)


def test_a_death_costs_those_whom_the_worker_had() -> None:
    assert why(ending())
    assert not why(ending(number=8))


def test_a_death_costs_nobody_old_once_sessions_are_deposited() -> None:
    assert not why(ending(), ALL)
    assert why(ending(began=99.0, greeted=99.0), ALL)


@pytest.mark.parametrize("kind", ["unix", "to unix", "tcptoudp"])
def test_what_cannot_be_deposited_goes_with_its_worker(kind: str) -> None:
    assert why(ending(kind=kind), ALL)


def test_a_loss_that_the_log_admits_is_excused() -> None:
    assert model.why_lost(Loss(ending(), recognised=True), [DEATH], ALL)
    assert not model.why_lost(Loss(ending(number=8), recognised=True), [DEATH], ALL)


def test_a_session_that_came_while_descriptors_were_few_is_not_deposited() -> None:
    few = Event(Blow.DESCRIPTORS, since=50.0, until=51.0)
    assert model.why_lost(Loss(ending(began=40.0), short_of=[few]), [DEATH], ALL)
    assert not model.why_lost(Loss(ending(began=60.0), short_of=[few]), [DEATH], ALL)


def test_an_orphan_has_no_deposit_until_the_next_master_has_taken_its_sessions() -> None:
    killed = Event(Blow.MASTER, since=90.0, until=98.0)
    assert model.why_lost(Loss(ending(), masters=[killed]), [DEATH], ALL)
    long_ago = Event(Blow.MASTER, since=80.0, until=81.0)
    assert not model.why_lost(Loss(ending(), masters=[long_ago]), [DEATH], ALL)


@pytest.mark.parametrize("outcome", model.NEVER)
def test_nothing_excuses_other_bytes_or_a_hang(outcome: str) -> None:
    assert not why(ending(outcome=outcome))


def test_what_ended_before_was_not_lost_by_it() -> None:
    assert not why(ending(ended=99.9))
    assert not why(ending(began=101.0, greeted=101.0, ended=102.0))


def test_an_upstream_takes_its_own_sessions_with_it() -> None:
    event = Event(Blow.UPSTREAM, 100.0, 101.0, port=9120)
    assert why(ending(port=9120), ALL, event)
    assert not why(ending(port=9100), ALL, event)
    assert why(ending(kind="group", greeted=None, began=99.9), ALL, event)


def test_too_few_descriptors_cost_those_that_come() -> None:
    event = Event(Blow.DESCRIPTORS, 100.0, 101.0)
    assert why(ending(greeted=None, began=100.1), ALL, event)
    assert not why(ending(), ALL, event)


def test_a_master_costs_nobody() -> None:
    assert not why(ending(), NONE, Event(Blow.MASTER, 100.0, 101.0))


def test_datagrams_under_way_go_with_a_worker_and_no_others() -> None:
    flow = ending(kind="udp", outcome=model.OK, lost=(50.0, 97.9, 98.2, 98.6, 103.0))
    assert model.lost_without_excuse(flow, [DEATH]) == [50.0, 103.0]


def test_the_last_lines_of_a_worker_may_be_missing() -> None:
    assert model.may_lack_its_line(ending(number=8, ended=99.0), [DEATH])
    assert model.may_lack_its_line(ending(ended=110.0), [DEATH])
    assert not model.may_lack_its_line(ending(number=8, ended=90.0), [DEATH])
    assert not model.may_lack_its_line(ending(), [Event(Blow.UPSTREAM, 100.0, 101.0)])


def test_a_seed_gives_the_same_acts() -> None:
    first, again = (list(itertools.islice(acts.plan(5), 200)) for _ in range(2))
    assert first == again
    assert first != list(itertools.islice(acts.plan(6), 200))
    assert {act.deed for act in first} == set(acts.Deed)


@pytest.mark.parametrize("variant", range(config.VARIANTS))
def test_configurations_are_what_they_should_be(variant: int) -> None:
    text = config.valid(Path("/nowhere"), Path("/nowhere/log"), variant)
    assert parse(text, "a.toml", Dialect.TOML).config.rules
    assert tomllib.loads(text)["workers"] == config.WORKERS
    bad = config.invalid(config.valid(Path("/nowhere"), Path("/nowhere/log")), variant)
    assert bad != config.valid(Path("/nowhere"), Path("/nowhere/log"))


@given(st.integers(1, MOST - 1))
def test_an_address_says_which_client_it_is(number: int) -> None:
    assert number_of(address_of(number)) == number
    assert number_of(f"::ffff:{address_of(number)}") == number


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "unix", "::1", "127.128.0.1"])
def test_others_are_no_clients(host: str) -> None:
    assert number_of(host) == 0


@given(st.integers(1, MOST - 1), st.integers(0, 1 << 40), st.integers(1, 200_000))
def test_a_text_is_known_by_its_client_and_place(number: int, at: int, size: int) -> None:
    said = b""
    while len(said) < size:
        said += text(number, at + len(said), size - len(said))
    assert is_text(number, at, said)
    wrong = bytearray(said)
    wrong[size // 2] ^= 1
    assert not is_text(number, at, bytes(wrong))
