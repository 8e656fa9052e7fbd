"""When a rule that waits for its address is tried again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forwarder.serving.retries import FIRST_DELAY_S, LONGEST_DELAY_S, Retries


def test_the_pause_doubles_up_to_the_longest() -> None:
    retries, now, pauses = Retries(), 100.0, []
    for _ in range(8):
        retries.on_failure("rule", "why", now)
        assert retries.deadline is not None
        pauses.append(retries.deadline - now)
        now = retries.deadline
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_only_the_first_failure_is_news_and_the_reason_is_the_last_one() -> None:
    retries = Retries()
    assert retries.on_failure("rule", "no address", 0.0)
    assert not retries.on_failure("rule", "in use", 1.0)
    waiting = retries.get("rule")
    assert waiting is not None
    assert (waiting.why, waiting.failures) == ("in use", 2)
    assert retries.on_success("rule") == 2
    assert retries.get("rule") is None
    assert retries.on_success("rule") == 0
    assert retries.on_failure("rule", "again", 9.0), "a new wait is news"


def test_nothing_is_due_before_the_first_is() -> None:
    retries = Retries()
    assert retries.deadline is None
    assert retries.due(1e9) == set()
    retries.on_failure("early", "why", 0.0)
    retries.on_failure("late", "why", 0.9)
    for _ in range(5):
        retries.on_failure("much later", "why", 0.0)
    assert retries.due(FIRST_DELAY_S - 0.01) == set()
    assert retries.due(FIRST_DELAY_S) == {"early", "late"}, "what is due soon comes along"


def test_what_is_no_longer_configured_is_forgotten() -> None:
    retries = Retries()
    for name in "abc":
        retries.on_failure(name, "why", 0.0)
    retries.keep(["b", "d"])
    assert len(retries) == 1
    assert retries.due(10.0) == {"b"}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0.0, 100.0))))
def test_who_fails_is_due_within_the_longest_pause(
    events: list[tuple[str, bool, float]],
) -> None:
    """Whatever comes. Result: every rule that failed last is due, and nobody else is."""
    retries, now, failed = Retries(), 0.0, set()
    for name, is_good, pause_s in events:
        now += pause_s
        if is_good:
            retries.on_success(name)
            failed.discard(name)
        else:
            retries.on_failure(name, "why", now)
            failed.add(name)
    assert retries.due(now + LONGEST_DELAY_S) == failed
    assert len(retries) == len(failed)


def test_what_appears_hastens_all_but_not_more_than_once_a_second() -> None:
    """However often something changes, and however long the rules would have waited."""
    retries = Retries()
    for name in ("one", "other"):
        for second in range(8):
            retries.on_failure(name, "why", float(second))
    tried = []
    for step in range(300):
        now = 100 + step / 100
        retries.hasten_all(now)
        for name in retries.due(now):
            tried.append(now)
            retries.on_failure(name, "why", now)
    assert tried == [100.0] * 2 + [101.0] * 2 + [102.0] * 2
