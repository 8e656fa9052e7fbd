"""Servers of groups and orders as text, whatever an instance answers."""

from __future__ import annotations

import pytest

from forwarder.cli.status import (
    groups_as_text,
    order_as_text,
    servers_in,
    sessions_as_text,
    sessions_of,
)

UP: dict[str, object] = {
    "server": "10.0.0.1:80",
    "state": "up",
    "order": None,
    "weight": 3,
    "weight_now": 3.0,
    "sessions": 4,
    "sessions_total": 40,
    "failed": 1,
    "why": "",
}
ORDER: dict[str, object] = {
    "what": "drain",
    "reset": False,
    "weight": None,
    "by": "alice",
    "at": 940.0,
}
NOW = 1000.0


def line_of(**changes: object) -> list[str]:
    """The last columns of a server: state, weight, and why."""
    title, line = groups_as_text([{"name": "web", "servers": [{**UP, **changes}]}], NOW)
    at = [title.index(word) for word in ("state", "weight", "sessions", "why")]
    return [line[at[0] : at[1]].strip(), line[at[1] : at[2]].strip(), line[at[3] :]]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, ["up", "3", ""]),
        ({"since_s": 61.0}, ["up 1m1s", "3", ""]),
        ({"backup": True}, ["up backup", "3", ""]),
        ({"state": "slow", "weight_now": 0.75}, ["slow", "0.75 of 3", ""]),
        ({"state": "down", "since_s": 5, "why": "http 503", "weight_now": 0},
         ["down 5s", "0 of 3", "http 503"]),
        ({"state": "down", "is_used": True}, ["down", "3", "used all the same"]),
        ({"state": "slow", "is_used": True}, ["slow", "3", ""]),
        ({"order": ORDER, "weight_now": 0}, ["up", "0 of 3", "drained by alice 1m0s ago"]),
        ({"order": {**ORDER, "what": "disable", "reset": True, "weight": 7}, "why": "refused"},
         ["up", "3", "disabled with reset, weight 7 by alice 1m0s ago; refused"]),
        ({"order": {**ORDER, "what": "weight", "weight": 0, "at": 2000}, "weight_now": 0},
         ["up", "0 of 3", "weight 0 by alice 0s ago"]),
    ],
)  # fmt: skip
def test_a_server_in_the_list(changes: dict[str, object], shown: list[str]) -> None:
    assert line_of(**changes) == shown


def test_a_server_that_is_not_in_the_file_has_no_weight() -> None:
    absent = {"server": "a", "state": "absent", "order": ORDER}
    _, line = groups_as_text([{"name": "web", "servers": [absent]}], NOW)
    assert line.split() == [
        *("web", "a", "absent", "-", "0", "0", "0"),
        *("drained", "by", "alice", "1m0s", "ago"),
    ]


def test_sessions_that_wait_are_told_below() -> None:
    group = {"name": "web", "waiting": 2, "servers": [UP]}
    assert groups_as_text([group], NOW)[2:] == ["group web: 2 sessions wait for a server"]
    assert groups_as_text([], NOW) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"changed": True, "order": ORDER}, "drained, 4 sessions"),
        ({"changed": False, "order": ORDER}, "already drained by alice 1m0s ago, 4 sessions"),
        ({"changed": True, "sessions": 1}, "as configured, 1 session"),
        ({"changed": False, "state": "down"}, "already as configured, down, 4 sessions"),
        ({"changed": True, "state": "absent"}, "as configured, 4 sessions"),
    ],
)
def test_what_came_of_an_order(changes: dict[str, object], said: str) -> None:
    answer = {"group": "web", "servers": [{**UP, **changes}]}
    assert order_as_text(answer, NOW) == [f"web 10.0.0.1:80: {said}"]


def test_answers_that_make_no_sense_are_still_text() -> None:
    nonsense: list[object] = [None, 7, {"servers": [None, {"order": 7, "weight": "x"}]}]
    assert len(groups_as_text(nonsense, NOW)) == 3
    assert order_as_text({"servers": [7]}, NOW) == [
        "None None: already as configured, None, 0 sessions"
    ]
    assert servers_in({"servers": 7}) == []
    assert sessions_of({"servers": [UP, 7, {**UP, "server": "b"}]}, ["10.0.0.1:80"]) == 4


def test_sessions_have_columns_for_servers_if_one_has_a_server() -> None:
    plain: dict[str, object] = {"id": "1.1", "rule": "web"}
    of_group = {**plain, "group": "web", "server": "db:80"}
    assert "server" not in sessions_as_text([plain])[0]
    title, *lines = sessions_as_text([plain, of_group])
    assert title.split()[:6] == ["id", "rule", "client", "upstream", "group", "server"]
    assert [line.split()[4:6] for line in lines] == [["-", "-"], ["web", "db:80"]]
