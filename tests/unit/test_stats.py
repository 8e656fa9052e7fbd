"""Sums of what workers report."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from forwarder.net.channel import MAX_MESSAGE_BYTES
from forwarder.stats import COUNTERS, RULES_PER_REPORT, RuleCounts, Tally, take_report
from forwarder.status import as_bytes, as_duration, as_text


def counters(**values: int) -> dict[str, int]:
    return {**dict.fromkeys(COUNTERS, 0), **values}


def test_a_report_has_only_what_changed_and_only_once() -> None:
    rules = {"a": RuleCounts(sessions=1, opened=2, failed=1), "b": RuleCounts()}
    assert take_report(rules) == [["a", 1, 2, 1]]
    assert take_report(rules) == []
    rules["a"].sessions = 0
    assert take_report(rules) == [["a", 0, 0, 0]]


def test_a_report_fits_into_a_message_whatever_the_names() -> None:
    huge = 2**63
    rules = {
        chr(0x1F600 + i) * 100: RuleCounts(sessions=huge, opened=huge, failed=huge)
        for i in range(RULES_PER_REPORT + 1)
    }
    message = {
        "op": "stats",
        "counters": dict.fromkeys(COUNTERS, huge),
        "rules": take_report(rules),
    }
    assert len(json.dumps(message).encode()) <= MAX_MESSAGE_BYTES
    assert len(take_report(rules)) == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3]), st.sampled_from("ab"), st.integers(0, 5), st.booleans()
        )
    )
)
def test_totals_never_shrink_and_dead_workers_have_no_sessions(
    steps: list[tuple[int, str, int, bool]],
) -> None:
    tally, opened = Tally(), {"a": 0, "b": 0}
    open_now: dict[tuple[int, str], int] = {}
    for pid, name, sessions, dies in steps:
        tally.hear(pid, {"counters": counters(), "rules": [[name, sessions, 3, 0]]})
        opened[name] += 3
        open_now[pid, name] = sessions
        if dies:
            tally.on_exit(pid)
            open_now = {key: value for key, value in open_now.items() if key[0] != pid}
    for name, found in tally.rules("ab").items():
        assert found["sessions_total"] == opened[name]
        assert found["sessions"] == sum(v for key, v in open_now.items() if key[1] == name)


def test_a_worker_that_is_gone_still_counts() -> None:
    tally = Tally()
    tally.hear(1, {"counters": counters(sessions=2, bytes_c2u=10)})
    tally.hear(2, {"counters": counters(sessions=1, bytes_c2u=5)})
    tally.on_exit(1)
    assert tally.totals() == counters(sessions=1, bytes_c2u=15)


def test_nonsense_is_left_out() -> None:
    tally = Tally()
    tally.hear(1, {"counters": {"sessions": "many"}, "rules": [["a"], 7, ["a", "b", "c", "d"]]})
    tally.hear(1, {"counters": 1, "rules": None})
    assert tally.totals() == counters()


def test_rules_that_are_gone_are_forgotten_when_their_sessions_have_ended() -> None:
    tally = Tally()
    tally.hear(1, {"rules": [["a", 1, 1, 0], ["b", 0, 1, 0]]})
    tally.forget_rules([])
    assert [found["sessions_total"] for found in tally.rules("ab").values()] == [1, 0]


def test_durations_and_sizes_for_people() -> None:
    assert [as_duration(s) for s in (0, 59.9, 61, 3700, 90_000)] == [
        *("0s", "59s", "1m1s", "1h1m", "1d1h"),
    ]
    assert [as_bytes(n) for n in (0, 999, 1000, 2**20, 2**60)] == [
        *("0 B", "999 B", "1.0 KiB", "1.0 MiB", "1024.0 PiB"),
    ]


def test_a_status_without_anything_is_still_text() -> None:
    assert as_text({})[0].startswith("forwarder None")
