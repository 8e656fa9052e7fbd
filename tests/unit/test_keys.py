"""The table of keys and the model have the same in them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from forwarder.config import toml_values as read
from forwarder.config.keys import (
    AT_THE_TOP,
    DEFAULTS,
    OF_A_CHECK,
    OF_A_RULE,
    OF_A_SERVER,
    OF_CHECKS,
    Key,
    key_of,
)
from forwarder.config.model import (
    Check,
    Group,
    Limits,
    Rule,
    Settings,
    SocketOptions,
    Upstream,
)


@pytest.mark.parametrize(
    ("part", "without"),
    [
        (
            Rule,
            {
                "name",
                "listen",
                "upstreams",
                "group",
                "protocol",
                "access",
                "limits",
                "options",
                "place",
            },
        ),
        (Limits, set()),
        (SocketOptions, {"places"}),
        (Group, {"name", "check"}),
        (Upstream, {"end", "origin"}),
        (Check, {"kind", "send", "expect", "is_pattern"}),
        (Settings, {"logs", "is_pid_file_optional"}),
    ],
)
def test_every_field_has_a_key_but_those_that_several_make(part: type, without: set[str]) -> None:
    names = {field.name for field in fields(part)}
    assert {name for name in names if key_of(part, name) is None} == without


def test_no_two_keys_fill_one_field() -> None:
    tables = (OF_A_RULE, OF_A_SERVER, OF_A_CHECK, AT_THE_TOP, OF_CHECKS)
    every = [key for table in tables for key in table.values()]
    assert len({(key.of, key.field) for key in every}) == len(every)


def test_no_key_at_the_top_means_two_things() -> None:
    assert not DEFAULTS.keys() & AT_THE_TOP.keys()


def test_a_key_whose_field_is_missing_is_refused() -> None:
    with pytest.raises(TypeError, match="Limits has no field for the key weight"):
        Key("weight", read.flag, Limits)


def test_a_key_finds_its_field_whatever_the_unit() -> None:
    assert Key("idle_timeout", read.duration, Rule).field == "idle_timeout_s"
    assert Key("rcvbuf", read.number(1, 2), SocketOptions).field == "rcvbuf_bytes"
