"""What a run of bench.survival says of what streams have seen."""

from __future__ import annotations

import pytest

from bench.survival.findings import HEAD, Blow, Spell, row


def test_an_answer_of_the_streams() -> None:
    spell = Spell.of("3 1 0 2 1500 250000\n")
    assert (spell.lost, spell.young, spell.wrong, spell.failed) == (3, 1, 0, 2)
    assert spell.silences_s == (0.0015, 0.25)
    with pytest.raises(ValueError, match="invalid literal"):
        Spell.of("what?")


def test_a_row_adds_events_up() -> None:
    blows = [
        Blow(Spell(3, 1, 0, 2, (0.1, 0.2)), 50, 1.0),
        Blow(Spell(0, 0, 1, 0, (0.3,)), 50, None),
    ]
    found = dict(zip(HEAD, row("reload", blows, 5.0, leave_something=True), strict=True))
    assert found["streams lost, of"] == "4 of 100"
    assert found["wrong bytes"] == "1"
    assert found["connects failed"] == "2"
    assert found["longest, ms"] == "300.0"
    assert found["old processes stay"] == "after 1 of 2 longer than 5 s"


def test_where_old_processes_go_the_longest_counts() -> None:
    blows = [Blow(Spell(0, 0, 0, 0, ()), 50, at) for at in (0.5, 1.25)]
    assert row("upgrade", blows, 5.0, leave_something=True)[-1] == "1.2 s"
    assert row("kill", blows, 5.0, leave_something=False)[-1] == "-"
