"""Rows, the sums of them, and the status as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.cli.status import as_bytes, as_duration, as_text, moved_as_text
from forwarder.stats.board import ROWS
from forwarder.stats.ledger import Ledger
from forwarder.stats.reasons import REASONS, CloseReason, Phase, Who
from forwarder.stats.rows import (
    BYTES_C2U,
    CONNECT_BUCKETS,
    CONNECT_MS,
    ENDS,
    MOVED_IN,
    MOVED_OUT,
    SESSIONS,
    SESSIONS_TOTAL,
    WORDS,
    Rows,
    connect_bucket,
    connect_label,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    it = Ledger()
    yield it
    it.end()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.booleans())))
def test_what_was_counted_outlives_workers_and_what_was_open_does_not(
    steps: list[tuple[str, int, bool]],
) -> None:
    """Workers count sessions and die; a plain model knows what must be told."""
    ledger = Ledger()
    boards = [ledger.open() for _ in range(3)]
    total = dict.fromkeys("ab", 0)
    is_open: dict[tuple[str, int], int] = {}
    for name, worker, dies in steps:
        row = boards[worker].row(ledger.row(name))
        row[SESSIONS_TOTAL] += 1
        row[SESSIONS] += 1
        total[name] += 1
        is_open[name, worker] = is_open.get((name, worker), 0) + 1
        if dies:
            ledger.close(boards[worker])
            boards[worker] = ledger.open()
            is_open = {key: count for key, count in is_open.items() if key[1] != worker}
    for name in "ab":
        found = ledger.rule(name)
        still_open = sum(n for key, n in is_open.items() if key[0] == name)
        assert found["sessions_total"] == total[name]
        assert found["sessions"] == still_open
        lost = {"us/error": total[name] - still_open} if total[name] > still_open else {}
        assert found["ends"] == lost
    ledger.end()


def test_sessions_between_two_workers_are_open_and_lost_ones_have_ended(ledger: Ledger) -> None:
    """A worker gives three of five up, dies, and two of the three find another one."""
    giver, taker = ledger.open(), ledger.open()
    row = giver.row(ledger.row("a"))
    row[SESSIONS_TOTAL], row[SESSIONS], row[MOVED_OUT] = 5, 2, 3
    ledger.afloat = lambda: {"a": 3}
    assert ledger.totals_now()["sessions"] == ledger.rule("a")["sessions"] == 5
    ledger.close(giver)
    assert ledger.rule("a")["sessions"] == 3
    assert ledger.forget([]) == []
    ledger.afloat = dict
    row = taker.row(ledger.row("a"))
    row[SESSIONS] = row[MOVED_IN] = 2
    ledger.lose("a", 1)
    found, totals = ledger.rule("a"), ledger.totals_now()
    assert found["sessions"] == totals["sessions"] == ledger.sessions(taker) == 2
    assert found["ends"] == {"us/error": 3}
    assert found["moved_in"] == found["moved_out"] == totals["moved_in"] == 3


def test_bytes_outlive_the_worker_that_moved_them(ledger: Ledger) -> None:
    board = ledger.open()
    board.row(ledger.row("a"))[BYTES_C2U] = 5
    ledger.close(board)
    assert ledger.rule("a")["bytes_c2u"] == 5


def test_a_row_that_is_forgotten_can_still_be_counted_down_by_a_worker_that_is_late(
    ledger: Ledger,
) -> None:
    board = ledger.open()
    row = board.row(ledger.row("a"))
    row[SESSIONS_TOTAL] = 7
    ledger.forget([])
    row[SESSIONS] += 1  # it was about to when the master looked
    ledger.forget([])
    row[SESSIONS] -= 1
    assert row[SESSIONS_TOTAL] == 0


def test_rules_that_are_gone_are_forgotten_when_their_sessions_have_ended(ledger: Ledger) -> None:
    board = ledger.open()
    number = ledger.row("a")
    board.row(number)[SESSIONS] = 1
    board.row(number)[SESSIONS_TOTAL] = 1
    ledger.forget(["b"])
    assert ledger.row("a") == number
    board.row(number)[SESSIONS] = 0
    ledger.forget(["b"])
    assert ledger.row("c") == number
    assert ledger.rule("c")["sessions_total"] == 0


def test_rules_beyond_the_last_row_share_it() -> None:
    rows: Rows[str] = Rows(0, 4)
    assert [rows.of(name) for name in "abcdab"] == [1, 2, 3, 3, 1, 2]
    assert rows.forgettable("d").keys() == {"a", "b", "c"}
    for name in "abc":
        rows.forget(name)
    assert [rows.of(name) for name in "defg"] == [3, 2, 1, 3]


def test_names_of_rules_that_share_a_row_are_forgotten_and_its_counts_are_not(
    ledger: Ledger,
) -> None:
    board = ledger.open()
    for number in range(ROWS + 5):
        ledger.row(f"rule {number}")
    last = ledger.row(f"rule {ROWS}")
    assert last == ROWS - 1
    board.row(last)[SESSIONS_TOTAL] = 3
    ledger.forget([f"rule {ROWS + 1}"])
    assert ledger.rule(f"rule {ROWS + 1}")["sessions_total"] == 3
    assert ledger.row("another") != last


@given(st.floats(0, 1e6))
def test_every_connect_time_has_the_bucket_that_its_label_says(seconds: float) -> None:
    bucket = connect_bucket(seconds) - CONNECT_MS
    label = connect_label(bucket)
    if label.startswith("<"):
        assert int(seconds * 1000) < int(label[1:])
        assert bucket == 0 or int(seconds * 1000) >= int(label[1:]) // 2
    else:
        assert int(seconds * 1000) >= int(label[2:])
        assert bucket == CONNECT_BUCKETS - 1


def test_every_reason_has_a_place_of_its_own_in_a_row() -> None:
    assert len(set(REASONS)) == len(REASONS)
    assert ENDS + len(REASONS) <= WORDS
    assert REASONS[CloseReason(Who.US, Phase.IDLE).index] == "us/idle"
    with pytest.raises(KeyError):
        CloseReason(Who.CLIENT, Phase.SHUTDOWN)


def test_durations_and_sizes_for_people() -> None:
    assert [as_duration(s) for s in (0, 59.9, 61, 3700, 90_000)] == [
        *("0s", "59s", "1m1s", "1h1m", "1d1h"),
    ]
    assert [as_bytes(n) for n in (0, 999, 1000, 2**20, 2**60)] == [
        *("0 B", "999 B", "1.0 KiB", "1.0 MiB", "1024.0 PiB"),
    ]


def test_a_status_without_anything_is_still_text() -> None:
    assert as_text({}, 0.0)[0].startswith("forwarder None")


def test_a_session_is_counted_for_its_rule_and_its_server_and_once_in_sums(ledger: Ledger) -> None:
    boards = [ledger.open(), ledger.open()]
    rule, server = ledger.row("a"), ledger.server_row("pg", "10.0.0.1:5432")
    for board in boards:
        for row in (rule, server):
            board.row(row)[SESSIONS_TOTAL] += 3
            board.row(row)[SESSIONS] += 1
            board.row(row)[BYTES_C2U] += 10
    ledger.close(boards[0])
    assert ledger.sum(SESSIONS_TOTAL) == 6
    assert ledger.sum(SESSIONS) == 1
    assert ledger.sum(BYTES_C2U) == 20
    for found in (ledger.rule("a"), ledger.server("pg", "10.0.0.1:5432")):
        assert found["sessions_total"] == 6
        assert found["sessions"] == 1
        assert found["bytes_c2u"] == 20
        assert found["ends"] == {"us/error": 1}, "lost with its worker"


def test_servers_have_rows_of_their_own_by_group(ledger: Ledger) -> None:
    """The first of the range is none of theirs: workers count failed connects to all there."""
    names = [("pg", "h:1"), ("pg", "h:2"), ("pg", ""), ("web", "h:1")]
    rows = [ledger.server_row(*one) for one in names]
    assert rows == list(range(ROWS + 1, ROWS + 5))
    assert [ledger.server_row(*one) for one in names] == rows
    assert ledger.row("pg") < ROWS
    assert sorted(ledger.rows_in_use()) == [ledger.row("pg"), *rows]
    assert ledger.find_server("web", "h:2") is None


def test_failed_connects_to_any_server_are_no_sessions(ledger: Ledger) -> None:
    board = ledger.open()
    ledger.server_row("pg", "h:1")
    board.row(ROWS)[SESSIONS] = 5
    ledger.close(board)
    assert ledger.sum(SESSIONS) == 0
    assert ledger.server("pg", "h:1")["sessions"] == 0
    assert ledger.server("pg", "h:1")["ends"] == {}


def test_a_server_without_a_row_has_counted_nothing_and_gets_none(ledger: Ledger) -> None:
    assert ledger.server("pg", "h:1")["sessions_total"] == 0
    assert ledger.servers() == []


def test_servers_are_forgotten_when_nothing_of_them_is_left(ledger: Ledger) -> None:
    board = ledger.open()
    names = [("pg", f"h:{port}") for port in range(4)]
    rows = [ledger.server_row(*one) for one in names]
    board.row(rows[0])[SESSIONS] = 1
    board.row(rows[3])[SESSIONS_TOTAL] = 7
    busy = rows[1]
    forgotten = ledger.forget_servers([names[2]], lambda row: row != busy)
    assert forgotten == {names[3]: rows[3]}
    assert ledger.server_row("web", "h:1") == rows[3]
    assert ledger.server("web", "h:1")["sessions_total"] == 0
    board.row(rows[0])[SESSIONS] = 0
    assert ledger.forget_servers([names[2], ("web", "h:1")]).keys() == {names[0], names[1]}


def test_rules_are_forgotten_without_their_servers(ledger: Ledger) -> None:
    ledger.row("pg")
    row = ledger.server_row("pg", "h:1")
    ledger.forget([])
    assert ledger.find_server("pg", "h:1") == row


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("of"), st.sampled_from("abcdef"), st.just(0)),
            st.tuples(st.just("adopt"), st.sampled_from("abcdef"), st.integers(0, 9)),
            st.tuples(st.just("forget"), st.sampled_from("abcdef"), st.just(0)),
        )
    )
)
def test_no_two_have_one_row_but_the_shared_one(steps: list[tuple[str, str, int]]) -> None:
    """Rows from 3, five of them: 3 is nobody's, 7 is shared, 4 to 6 are given."""
    rows: Rows[str] = Rows(3, 8)
    has: dict[str, int] = {}
    for what, key, number in steps:
        if what == "of":
            had = has.get(key)
            has[key] = rows.of(key)
            assert had in (None, has[key])
        elif what == "adopt":
            is_free = number == 7 or (4 <= number <= 6 and number not in has.values())
            may = has[key] == number if key in has else is_free
            assert rows.adopt(key, number) == may
            if may:
                has[key] = number
        elif key in has:
            rows.forget(key)
            del has[key]
        own = [row for row in has.values() if row != 7]
        assert len(set(own)) == len(own)
        assert set(own) <= {4, 5, 6}
        assert dict(rows.items()) == has
        assert set(rows.used()) == set(has.values())
    own = [row for row in has.values() if row != 7]
    while len(own) < 3:  # nothing is lost: all rows can be had
        own.append(rows.of(f"new {len(own)}"))
    assert sorted(own) == [4, 5, 6]


def test_moved_sessions_are_in_the_text_of_the_status_if_there_are_some() -> None:
    assert "moved" not in as_text({"totals": {"moved_in": 0}}, 0.0)[1]
    assert as_text({"totals": {"moved_in": 1}}, 0.0)[1].endswith(
        "; 1 session moved to other workers"
    )


def test_what_became_of_an_order_to_move_sessions_is_said_in_full() -> None:
    assert moved_as_text({"moved": 2, "busy": 0, "back": 0}, 3) == [
        "2 sessions moved to the worker in slot 3"
    ]
    lines = moved_as_text({"moved": 0, "busy": 1, "back": 4}, 3)
    assert lines[0] == "0 sessions moved to the worker in slot 3"
    assert lines[1].startswith("1 session cannot be moved yet: ")
    assert lines[2:] == ["4 sessions stay where they are"]
