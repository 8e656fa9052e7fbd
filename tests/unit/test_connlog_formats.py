"""The lines of the connection log, byte for byte, and that JSON stays JSON whatever is in it."""

from __future__ import annotations

import json
import locale
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.model import LogFormat
from forwarder.connlog import formats
from forwarder.connlog.formats import FORMATS, Format, common_line, json_line, rinetd_line
from forwarder.connlog.log import ConnectionLog
from forwarder.connlog.record import Event, Record, rinetd_result
from forwarder.stats.reasons import (
    CLIENT_HAD_ENDED,
    REASONS,
    UPSTREAM_HAD_ENDED,
    CloseReason,
    Phase,
    Who,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# rinetd#31, in features of rinetd 0.73: 9 September 2022, 12:31:32 in Berlin.
AT = 1662719492.25
OPENED = Record(
    event=Event.OPENED,
    at=AT,
    session="7.1",
    rule="ssh",
    protocol="tcp",
    client_host="127.0.0.1",
    client_port=4711,
    listen=("127.0.0.1", 2222),
    upstream=("127.0.0.1", 22),
    result="opened",
)
ENDED = OPENED._replace(
    event=Event.ENDED,
    result="done-remote-closed",
    local="127.0.0.1:2222",
    reached="127.0.0.1:22",
    bytes_c2u=12,
    bytes_u2c=3456,
    connect_s=0.002,
    duration_s=2.5,
    end="client/data",
    worker=3,
)

REFUSED = OPENED._replace(
    event=Event.REFUSED, session="", end="us/access", detail="denied", result="denied"
)


@contextmanager
def zone(name: str) -> Iterator[None]:
    """Local time is that of a POSIX time zone, whose sign is that of the west (tzset(3))."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        patch.setattr(formats, "_clock", formats._Clock())
        yield
    time.tzset()


def test_the_tab_format_is_that_of_rinetd_with_the_blank_behind_the_time() -> None:
    with zone("CET-2"):
        assert rinetd_line(OPENED) == (
            "09/Sep/2022:12:31:32 \t127.0.0.1\t127.0.0.1\t2222\t127.0.0.1\t22\t0\t0\topened\n"
        )
        assert rinetd_line(ENDED).split("\t")[6:] == ["12", "3456", "done-remote-closed\n"]


def test_the_common_format_has_two_blanks_before_the_zone_and_the_counts_the_other_way_round() -> (
    None
):
    with zone("CET-2"):
        assert common_line(ENDED) == (
            "127.0.0.1 - - [09/Sep/2022:12:31:32  +0200] "
            '"GET /rinetd-services/127.0.0.1/2222/127.0.0.1/22/done-remote-closed HTTP/1.0" '
            "200 3456 - - - 12\n"
        )


def test_the_json_of_a_session_has_everything_in_this_order() -> None:
    with zone("NST3:30"):
        assert json_line(ENDED) == (
            '{"time":"2022-09-09T07:01:32.250-03:30","event":"ended","id":"7.1","rule":"ssh",'
            '"protocol":"tcp","client":"127.0.0.1","client_port":4711,"local":"127.0.0.1:2222",'
            '"upstream":"127.0.0.1:22","bytes_c2u":12,"bytes_u2c":3456,"connect_ms":2,'
            '"duration_ms":2500,"worker":3,"end":"client/data","detail":""}\n'
        )


def test_json_has_no_line_for_a_session_that_has_only_begun() -> None:
    assert json_line(OPENED) is None


@pytest.mark.parametrize("server", ["a.example:22", ""])
def test_a_session_of_a_group_tells_its_server(server: str) -> None:
    found = json.loads(json_line(ENDED._replace(group="pg", server=server)) or "")
    assert (found["group"], found["server"]) == ("pg", server or None)
    plain = json.loads(json_line(ENDED) or "")
    assert found.keys() - plain.keys() == {"group", "server"}


@pytest.mark.parametrize("how", LogFormat)
def test_a_format_wants_the_records_of_which_it_has_a_line(how: LogFormat) -> None:
    wanted = FORMATS[how]
    assert wanted.wants_opened is (wanted.line(OPENED) is not None)
    assert wanted.wants_refused is (wanted.line(REFUSED) is not None)
    assert wanted.line(ENDED) is not None


def test_a_log_wants_what_any_of_its_formats_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no record is made of which no line will be."""
    monkeypatch.setitem(formats.FORMATS, LogFormat.COMMON, Format(lambda _: None, False, False))
    log = ConnectionLog()
    assert (log.tells_opened, log.tells_refused) == (False, False)
    for places, told in (
        ([LogFormat.COMMON], (False, False)),
        ([LogFormat.COMMON, LogFormat.JSON], (False, True)),
        ([LogFormat.JSON, LogFormat.RINETD], (True, True)),
    ):
        log.set_places([(how, "journal", None) for how in places])
        assert (log.tells_opened, log.tells_refused) == told
    log.close()


def test_what_is_not_known_is_null() -> None:
    found = json.loads(json_line(REFUSED) or "")
    assert (found["event"], found["upstream"], found["connect_ms"]) == ("refused", None, None)
    assert (found["end"], found["detail"], found["bytes_c2u"]) == ("us/access", "denied", 0)


@pytest.mark.parametrize(
    ("name", "rinetd_time", "offset", "iso"),
    [
        ("UTC0", "09/Sep/2022:10:31:32 ", "+0000", "2022-09-09T10:31:32.250+00:00"),
        ("NPT-5:45", "09/Sep/2022:16:16:32 ", "+0545", "2022-09-09T16:16:32.250+05:45"),
        ("NST3:30", "09/Sep/2022:07:01:32 ", "-0330", "2022-09-09T07:01:32.250-03:30"),
        ("LINT-14", "10/Sep/2022:00:31:32 ", "+1400", "2022-09-10T00:31:32.250+14:00"),
        ("XXX0:15", "09/Sep/2022:10:16:32 ", "-0015", "2022-09-09T10:16:32.250-00:15"),
    ],
)
def test_every_time_zone_is_written_as_it_is(
    name: str, rinetd_time: str, offset: str, iso: str
) -> None:
    with zone(name):
        assert rinetd_line(ENDED).split("\t")[0] == rinetd_time
        assert f"[{rinetd_time} {offset}]" in common_line(ENDED)
        found = json.loads(json_line(ENDED) or "")
        assert found["time"] == iso
        assert datetime.fromisoformat(found["time"]).timestamp() == AT


def test_the_clock_goes_on_and_comes_back() -> None:
    with zone("UTC0"):
        texts = [rinetd_line(OPENED._replace(at=at)).split("\t")[0] for at in (0, 59.999, 60, 1.5)]
    assert [text[12:] for text in texts] == ["00:00:00 ", "00:00:59 ", "00:01:00 ", "00:00:01 "]


def test_months_are_english_in_every_locale() -> None:
    before = locale.setlocale(locale.LC_ALL)
    try:
        for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8", ""):
            with suppress(locale.Error):
                locale.setlocale(locale.LC_ALL, name)
        with zone("UTC0"):
            texts = [
                rinetd_line(OPENED._replace(at=at)).split("/")[1]
                for at in (86400 * 31 * month + 86400.0 for month in range(12))
            ]
    finally:
        locale.setlocale(locale.LC_ALL, before)
    assert texts == [
        "Jan",
        "Feb",
        "Mar",
        "Apr",
        "May",
        "Jun",
        "Jul",
        "Aug",
        "Sep",
        "Oct",
        "Nov",
        "Dec",
    ]


def test_clients_of_unix_sockets_and_of_ipv6() -> None:
    unix = OPENED._replace(client_host="unix", client_port=0, listen=("unix:/run/a.sock", 0))
    assert rinetd_line(unix).split("\t")[1:4] == ["unix", "unix:/run/a.sock", "0"]
    six = OPENED._replace(client_host="fe80::1%eth0", upstream=("2001:db8::7", 80))
    assert rinetd_line(six).split("\t")[1:6:4] == ["fe80::1%eth0", "80"]
    assert "/127.0.0.1/2222/2001:db8::7/80/opened" in common_line(six)


def test_control_characters_never_end_a_field_or_a_line() -> None:
    odd = ENDED._replace(listen=("a\tb\nc\rd\x1b\x7f", 1), client_host="x\ny")
    for line in (rinetd_line(odd), common_line(odd), json_line(odd) or ""):
        assert line.isprintable() or line.count("\n") == 1
        assert line.endswith("\n")
    fields = rinetd_line(odd).rstrip("\n").split("\t")
    assert (len(fields), fields[1], fields[2]) == (9, "x\\x0ay", "a\\x09b\\x0ac\\x0dd\\x1b\\x7f")


TEXT = st.text(st.characters(codec=None), max_size=30)


@given(TEXT, TEXT, TEXT, TEXT, st.floats(0, 4e9), st.floats(0, 1e7), st.integers(0, 2**64))
def test_every_line_of_json_is_one_and_says_what_it_was_told(
    rule: str, detail: str, reached: str, host: str, at: float, seconds: float, count: int
) -> None:
    record = ENDED._replace(
        rule=rule,
        detail=detail,
        reached=reached,
        client_host=host,
        local=reached,
        at=at,
        duration_s=seconds,
        bytes_c2u=count,
    )
    line = json_line(record)
    assert line is not None
    assert line.isascii()
    assert line.index("\n") == len(line) - 1
    found = json.loads(line)
    assert (found["rule"], found["detail"], found["upstream"]) == (rule, detail, reached)
    assert (found["client"], found["bytes_c2u"]) == (host, count)
    assert abs(datetime.fromisoformat(found["time"]).timestamp() - at) <= 0.0011
    assert abs(found["duration_ms"] - seconds * 1000) <= 0.51
    for other in (rinetd_line(record), common_line(record)):
        encoded = other.encode(errors="backslashreplace")
        assert encoded.index(b"\n") == len(encoded) - 1
    assert rinetd_line(record).count("\t") == 8


def test_rinetds_word_for_every_way_to_end() -> None:
    words = {
        str(reason): rinetd_result(reason)
        for reason in (
            CloseReason(who, phase, is_reset=is_reset)
            for who in Who
            for phase in Phase
            for is_reset in (False, True)
            if f"{who.value}/{phase.value}{'/reset' * is_reset}" in REASONS
        )
    }
    assert words == {
        "client/data": "done-remote-closed",
        "client/data/reset": "done-remote-closed",
        "upstream/data": "done-local-closed",
        "upstream/data/reset": "done-local-closed",
        "client/half-close/reset": "done-local-closed",
        "upstream/half-close/reset": "done-remote-closed",
        "us/half-close": "done-remote-closed",
        "us/idle": "done-remote-closed",
        "client/connect/reset": "done-remote-closed",
        "upstream/connect": "local-connect-failed -",
        "us/connect": "local-connect-failed -",
        "us/accept": "accept-failed -",
        "us/access": "done-local-closed",
        "us/limit": "done-local-closed",
        "us/drain": "done-local-closed",
        "us/lost": "done-local-closed",
        "us/shutdown": "done-local-closed",
        "us/kill": "done-local-closed",
        "us/error": "done-local-closed",
        "us/upstream-down": "done-local-closed",
    }
    assert set(words) == set(REASONS)
    assert rinetd_result(CLIENT_HAD_ENDED) == "done-remote-closed"
    assert rinetd_result(UPSTREAM_HAD_ENDED) == "done-local-closed"
