"""Values of groups and checks: what may be written, what it means, and that it is shown alike."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.check_values import (
    MOST_BYTES,
    Expected,
    between,
    between_forms,
    parse_bytes,
    parse_command,
    parse_expected,
    parse_prefixes,
    parse_start,
    parse_status,
    part,
    percent,
    show_bytes,
    show_expected,
    show_prefixes,
    show_status,
)

if TYPE_CHECKING:
    from collections.abc import Callable

RANGE = st.tuples(st.integers(100, 599), st.integers(100, 599)).map(lambda two: tuple(sorted(two)))


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_can_be_written_and_are_read_as_they_were(data: bytes) -> None:
    assert parse_bytes(show_bytes(data)) == data
    assert show_bytes(data).isprintable()
    assert parse_expected(show_expected(Expected(data))) == Expected(data)


def test_bytes_that_begin_as_a_pattern_does_are_shown_as_bytes() -> None:
    assert parse_expected(show_expected(Expected(b"re:x"))) == Expected(b"re:x")


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("PING\r\n", b"PING\r\n"),
        (r"PING\r\n", b"PING\r\n"),
        (r"\x00\xfF\\\t", b"\x00\xff\\\t"),
        ("é", b"\xc3\xa9"),
    ],
)
def test_bytes_are_written_with_escapes_or_as_they_are(text: str, data: bytes) -> None:
    assert parse_bytes(text) == data


def test_a_pattern_keeps_its_escapes_for_the_expression() -> None:
    assert parse_expected(r"re:^\+PONG\r\n") == Expected(rb"^\+PONG\r\n", is_pattern=True)
    assert show_expected(Expected(rb"^\+PONG", is_pattern=True)) == r"re:^\+PONG"


@given(st.lists(RANGE, min_size=1, max_size=5).map(tuple))
def test_codes_are_read_as_they_are_shown(status: tuple[tuple[int, int], ...]) -> None:
    assert parse_status(show_status(status)) == status


def test_codes_may_be_a_number_or_have_blanks() -> None:
    assert parse_status(204) == ((204, 204),)
    assert parse_status("200 - 299, 401") == ((200, 299), (401, 401))


def test_bits_per_cent_and_starts_are_read() -> None:
    assert parse_prefixes("24/56") == (24, 56)
    assert show_prefixes((24, 56)) == "24/56"
    assert [percent(100)(value) for value in (0, 30, "30%", "30 %", 100)] == [0, 30, 30, 30, 100]
    assert part(50)("5%") == 0.05
    assert [parse_start(value) for value in ("up", "down")] == [False, True]
    assert parse_command(["/bin/true", "-q"]) == ("/bin/true", "-q")


def test_durations_within_bounds_are_read_and_the_bounds_are_named() -> None:
    assert between(0.1, 3600)("100ms") == 0.1
    assert between(1, 3600, or_none=True)(0) == 0
    assert between_forms(0.1, 3600) == 'a duration from "100ms" to "1h"'
    assert between_forms(1, 300, or_none=True) == 'a duration from "1s" to "5m", or 0'


@pytest.mark.parametrize(
    ("parse", "value", "why"),
    [
        (parse_bytes, "", "is empty"),
        (parse_bytes, 5, "is not a text"),
        (parse_bytes, "x" * (MOST_BYTES + 1), "is 4097 bytes long, and may be 4096"),
        (parse_bytes, r"\x4", r"has '\\x' in it"),
        (parse_bytes, "a\\", r"has '\\' in it"),
        (parse_bytes, r"\é", "has"),
        (parse_expected, "re:", "is empty"),
        (parse_expected, "re:(", "is no regular expression: missing )"),
        (parse_expected, ["re:"], "is not a text"),
        (parse_status, "600", "is not a list of codes"),
        (parse_status, "200-", "is not a list of codes"),
        (parse_status, True, "is not a list of codes"),
        (parse_status, 2.5, "is not a list of codes"),
        (parse_status, "299-200", "has a range that ends before it begins: 299-200"),
        (parse_prefixes, "24", "is not two numbers of bits"),
        (parse_prefixes, "33/128", "is not from 1/1 to 32/128"),
        (parse_prefixes, "0/128", "is not from 1/1 to 32/128"),
        (parse_command, [], "is not a list of 1 to 100 texts"),
        (parse_command, "/bin/true", "is not a list of 1 to 100 texts"),
        (parse_command, ["/bin/true", 1], "has an element that is not a text"),
        (parse_command, ["/bin/true", "\0"], "has an element that is not a text"),
        (parse_command, ["true"], "begins with 'true', which is not an absolute path"),
        (parse_start, "Up", "is neither of the two"),
        (parse_start, [], "is neither of the two"),
        (percent(50), 51, "is not from 0 to 50 per cent"),
        (percent(50), True, "is not from 0 to 50 per cent"),
        (percent(50), "5", "is not from 0 to 50 per cent"),
        (between(0.1, 3600), "99ms", "is not from 100ms to 1h"),
        (between(0.1, 3600), 0, "is not from 100ms to 1h"),
        (between(0.1, 3600), "soon", "is not a duration"),
    ],
)
def test_what_is_none_says_why(parse: Callable[[object], object], value: object, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse(value)
