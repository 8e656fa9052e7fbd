"""Which addresses have failed just now: who tries them first, and for how long nobody does."""

from __future__ import annotations

import socket

import pytest

from forwarder.net.sockets import Target
from forwarder.upstream.failures import FIRST_S, FORGET_S, MAX_KNOWN, MOST_S, Failures

A, B, C = (Target(socket.AF_INET, (f"192.0.2.{n}", 80)) for n in (1, 2, 3))


@pytest.fixture
def failures() -> Failures:
    return Failures()


def test_what_has_just_failed_is_tried_last_but_never_left_out(failures: Failures) -> None:
    assert failures.note(A, "refused", 100.0)
    assert failures.order((A, B, C), 100.0) == (B, C, A)
    failures.note(B, "refused", 100.0)
    assert failures.order((A, B, C), 100.0) == (C, A, B)
    failures.note(C, "refused", 100.0)
    assert failures.order((B, C, A), 100.0) == (B, C, A)


def test_what_works_is_avoided_no_more(failures: Failures) -> None:
    failures.note(A, "refused", 100.0)
    assert failures.forget(A)
    assert not failures.forget(A)
    assert not failures.known
    assert failures.order((A, B), 100.0) == (A, B)


def test_when_the_time_is_over_one_session_tries_it_and_the_others_wait_for_what_comes_of_that(
    failures: Failures,
) -> None:
    failures.note(A, "refused", 100.0)
    later = 100.0 + FIRST_S
    assert failures.order((A, B), later) == (A, B)
    assert failures.order((A, B), later) == (B, A)
    assert failures.order((A, B), later + FIRST_S) == (A, B)


def test_what_is_not_tried_first_takes_no_turn(failures: Failures) -> None:
    failures.note(A, "refused", 100.0)
    later = 100.0 + FIRST_S
    assert failures.order((B, A), later) == (B, A)
    assert failures.order((A, B), later) == (A, B)


def test_each_further_failure_doubles_the_time_up_to_a_minute(failures: Failures) -> None:
    now, pauses = 100.0, []
    for _ in range(8):
        failures.note(A, "refused", now)
        pauses.append(failures.known[A].until - now)
        now = failures.known[A].until
        failures.order((A,), now)
    assert pauses[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert pauses[-1] == MOST_S


def test_many_sessions_that_fail_at_the_same_time_are_one_failure(failures: Failures) -> None:
    assert [failures.note(A, "refused", 100.0 + n / 1000) for n in range(100)].count(True) == 1
    assert failures.known[A].until == 100.0 + FIRST_S
    assert (failures.known[A].since, failures.known[A].last) == (100.0, 100.099)


def test_what_is_remembered_is_bounded_and_the_oldest_makes_room(failures: Failures) -> None:
    targets = [Target(socket.AF_INET, ("192.0.2.1", port)) for port in range(MAX_KNOWN + 1)]
    for nth, target in enumerate(targets):
        failures.note(target, "refused", 100.0 + nth)
    assert len(failures.known) == MAX_KNOWN
    assert failures.order((targets[1], targets[0]), 101.0) == (targets[0], targets[1])


def test_what_nobody_has_tried_for_long_is_forgotten(failures: Failures) -> None:
    failures.note(A, "refused", 100.0)
    failures.note(B, "refused", 200.0)
    failures.expire(100.0 + FORGET_S)
    assert list(failures.known) == [B]
