"""What answers of servers and agents mean, and what is said of failures."""

from __future__ import annotations

import signal
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forwarder.checker.outcome import Advice, Word
from forwarder.checker.probes import why
from forwarder.checker.probes.agent_words import parse_words
from forwarder.checker.probes.expecting import REST_S, Expecting, Pattern
from forwarder.checker.probes.readers import MOST_BYTES, AgentLine, Reader, StatusLine, Verdict
from forwarder.config.model import Check, CheckKind

GOOD = Verdict(is_good=True)
CODES = ((200, 299), (401, 401))


def read(reader: Reader, pieces: list[bytes]) -> Verdict | None:
    """What a reader makes of an answer in pieces."""
    for piece in pieces:
        verdict = reader.read(piece)
        if verdict is not None:
            return verdict
    return None


def split(data: bytes, at: list[int]) -> list[bytes]:
    """``data`` cut at some places."""
    places = sorted({min(place, len(data)) for place in at} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


cuts = st.lists(st.integers(0, 120), max_size=6)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (b"HTTP/1.1 200 OK\r\n", GOOD),
        (b"HTTP/1.0 204\n", GOOD),
        (b"HTTP/1.1 299 \xc3\xa9\r\n", GOOD),
        (b"HTTP/1.1 401 Unauthorized\r\nA: b\r\n\r\n", GOOD),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", GOOD),
        (
            b"HTTP/1.1 103 Early\r\nLink: </a>\r\n\r\nHTTP/1.1 100 C\n\nHTTP/1.1 503 X\r\n",
            "http 503",
        ),
        (b"HTTP/1.1 101 Switching Protocols\r\n", "http 101"),
        (b"HTTP/1.1 503 Service Unavailable\r\n", "http 503"),
        (b"HTTP/1.1 302 Found\r\n", "http 302"),
        (b"HTTP/1.1 300 200\r\n", "http 300"),
        (b"HTTP/1.1 999 ?\r\n", "http 999"),
        (b"HTTP/1.1 20 X\r\n", "got 'HTTP/1.1 20 X'"),
        (b"HTTP/1.1 2000\r\n", "got 'HTTP/1.1 2000'"),
        (b"HTTP/1.1  200\r\n", "got 'HTTP/1.1  200'"),
        (b"HTTP/1.1 200\rX\n", "got 'HTTP/1.1 200...'"),
        (b"\r\nHTTP/1.1 200 OK\r\n", "got ''"),
        (b"", None),
        (b"HTTP/1.", None),
        (b"HTTP/1.1 200 OK", None),
        (b"HTTP/1.1 200 OK\r", None),
        (b"HTTP/1.1 100 Continue\r\nA: b\r\n", None),
    ],
)
@given(at=cuts)
def test_a_status_is_read_in_whatever_pieces_it_comes(
    answer: bytes, verdict: Verdict | str | None, at: list[int]
) -> None:
    expected = Verdict(False, verdict) if isinstance(verdict, str) else verdict
    assert read(StatusLine(CODES), split(answer, at)) == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"H",
        b"HTTP/2 200\r\n",
        b"\x00\x00\x12\x04\x00\x00",
        b"http/1.1 200 OK",
        b"HTTP/1.1 100 X\r\n\r\nSSH",
    ],
)
def test_what_is_no_http_is_known_by_its_first_bytes(answer: bytes) -> None:
    verdict = read(StatusLine(CODES), [answer[i : i + 1] for i in range(len(answer))])
    if answer == b"H":
        assert verdict is None
        return
    assert verdict is not None
    assert verdict.why.startswith("got '")


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 " + b"x" * MOST_BYTES, b"HTTP/1.1 100 C\r\n" + b"A: b\r\n" * MOST_BYTES],
)
def test_a_header_has_bounds(answer: bytes) -> None:
    reader = StatusLine(CODES)
    verdict = read(reader, split(answer, [1000, 5000]))
    assert verdict is not None
    assert not verdict.is_good
    assert len(reader.heard) <= MOST_BYTES


def expecting(expect: bytes, *, is_pattern: bool = False) -> Expecting:
    return Expecting(Check(kind=CheckKind.TCP, expect=expect, is_pattern=is_pattern))


@given(st.binary(max_size=60), st.binary(min_size=1, max_size=6), st.binary(max_size=60), cuts)
@example(b"aab", b"ab", b"", [1, 2])
def test_a_text_is_found_in_whatever_pieces_it_comes(
    before: bytes, text: bytes, after: bytes, at: list[int]
) -> None:
    assert read(expecting(text), split(before + text + after, at)) == GOOD


@given(st.binary(max_size=100), st.binary(min_size=1, max_size=4), cuts)
def test_a_text_is_found_only_if_it_is_there(data: bytes, text: bytes, at: list[int]) -> None:
    assert read(expecting(text), split(data, at)) == (GOOD if text in data else None)


def test_a_pattern_is_found_over_pieces() -> None:
    assert read(expecting(rb"\A220[ -]", is_pattern=True), [b"2", b"20", b"-x"]) == GOOD
    assert read(expecting(rb"\A220[ -]", is_pattern=True), [b"x220 "]) is None


def test_a_pattern_that_takes_without_end_is_given_up_and_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it costs the other checks a moment, once a minute."""
    pattern = Pattern(rb"(a+)+$")
    endless = bytearray(b"a" * 60 + b"b")
    assert pattern.is_in(endless) is None
    assert pattern.is_in(bytearray(b"a")) is None, "it rests"
    later = time.monotonic() + REST_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert pattern.is_in(bytearray(b"a")) is True
    assert pattern.is_in(bytearray(b"b")) is False
    assert pattern.is_in(endless) is None
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_an_answer_that_cannot_be_judged_says_nothing_of_its_server() -> None:
    verdict = read(expecting(rb"(b+)+$", is_pattern=True), [b"b" * 60 + b"c"])
    assert verdict is not None
    assert verdict.is_ours
    assert "regular expression" in verdict.why


def test_anything_will_do_where_nothing_is_expected() -> None:
    assert read(expecting(b""), [b"\0"]) == GOOD


@pytest.mark.parametrize("is_pattern", [False, True])
def test_no_more_than_16_kib_of_an_answer_are_looked_at(is_pattern: bool) -> None:
    for size, verdict in ((MOST_BYTES - 1, GOOD), (MOST_BYTES, Verdict(False, why.got(b"x" * 90)))):
        reader = expecting(b"!", is_pattern=is_pattern)
        assert read(reader, split(b"x" * size + b"!", [100, 16000])) == verdict
        assert len(reader.heard) == MOST_BYTES


@pytest.mark.parametrize(
    ("line", "advice", "reason"),
    [
        (b"75%", Advice(percent=75), ""),
        (b"0%", Advice(percent=0), ""),
        (b"150%", Advice(percent=100), ""),
        (b"maxconn:30", Advice(max_sessions=30), ""),
        (b"weight:20", Advice(weight=20), ""),
        (b"weight:50%", Advice(percent=50), ""),
        (b"weight:1000", Advice(weight=256), ""),
        (b"ready", Advice(word=Word.READY), ""),
        (b"up ready 100%", Advice(percent=100, word=Word.READY, is_up=True), ""),
        (b"drain, 10%\tup", Advice(percent=10, word=Word.DRAIN, is_up=True), ""),
        (b" maint ", Advice(word=Word.MAINT), ""),
        (b"DOWN", Advice(is_up=False), "agent: down"),
        (b"fail#disk", Advice(is_up=False), "agent: fail 'disk'"),
        (b"failed # disk is full", Advice(is_up=False), "agent: failed 'disk is full'"),
        (b"stopped#\x1b[2J", Advice(is_up=False), "agent: stopped '\\x1b[2J'"),
        (b"stopped #", Advice(is_up=False), "agent: stopped"),
        (b"down up", Advice(is_up=True), ""),
        (b"up#down", Advice(is_up=True), ""),
        (b"up maxconn:x 7 %", Advice(is_up=True), ""),
        (b"drain maint", Advice(word=Word.MAINT), ""),
    ],
)
def test_words_of_an_agent(line: bytes, advice: Advice, reason: str) -> None:
    said = parse_words(line)
    assert said is not None
    assert (said.advice, said.why) == (advice, reason)


@pytest.mark.parametrize(
    "line",
    [b"", b" ", b"#up", b"hello", b"75", b"%", b"-5%", b"maxconn:", b"maxconn:5%", b"uphill"],
)
def test_a_line_without_a_word_of_agents_says_nothing(line: bytes) -> None:
    assert parse_words(line) is None


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (b"up 50%\n", Verdict(True, "", Advice(percent=50, is_up=True))),
        (b"up\r\ndown\r\n", Verdict(True, "", Advice(is_up=True))),
        (b"drain\n", Verdict(True, "", Advice(word=Word.DRAIN))),
        (b"down#x\n", Verdict(False, "agent: down 'x'", Advice(is_up=False))),
        (b"HTTP/1.1 200 OK\n", Verdict(False, "got 'HTTP/1.1 200 OK'")),
        (b"\n", Verdict(False, "got ''")),
        (b"maxconn:3", None),
    ],
)
@given(at=cuts)
def test_a_line_of_an_agent_has_an_end(
    answer: bytes, verdict: Verdict | None, at: list[int]
) -> None:
    assert read(AgentLine(), split(answer, at)) == verdict


def test_a_line_of_an_agent_has_bounds() -> None:
    verdict = read(AgentLine(), [b"x" * 1000] * 3)
    assert verdict is not None
    assert not verdict.is_good


@given(st.binary(max_size=400))
def test_what_a_server_sends_breaks_no_line(data: bytes) -> None:
    for text in (why.got(data), why.last_line(data)):
        assert text.isprintable()
        assert len(text) <= why.MOST_SHOWN + 10


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"", "got ''"),
        (b"-ERR what?\r\n", "got '-ERR what?'"),
        (b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n", "got 'HTTP/1.1 400 Bad Request...'"),
        (b"x" * 80, "got '" + "x" * 80 + "'"),
        (b"x" * 81, "got '" + "x" * 80 + "...'"),
        (b"d\0\0\0\n5.5.5", "got 'd\\x00\\x00\\x00\\n5.5.5'"),
        (b"\xe9\n\\", "got '\\xe9\\n\\\\'"),
        (b"\r\nx", "got '\\r\\nx'"),
    ],
)
def test_of_an_answer_its_first_line_is_shown(data: bytes, shown: str) -> None:
    assert why.got(data) == shown


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"one\ntwo\n\n", "two"),
        (b"one\n  two \r\n", "two"),
        ("größer\n".encode(), "größer"),
        (b"\xff\x1b[2J", "\\xff\\x1b[2J"),
    ],
)
def test_the_last_line_of_a_command(output: bytes, line: str) -> None:
    assert why.last_line(output) == line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Connection refused", "connection refused"),
        ("RPC struct is bad", "RPC struct is bad"),
        (None, "unknown error"),
    ],
)
def test_errors_of_the_system_stand_within_a_sentence(text: str | None, said: str) -> None:
    assert why.of_error(text) == said
