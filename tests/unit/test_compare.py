"""What differs between two configurations is told in the words of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from forwarder.config import Dialect, parse
from forwarder.config.compare import compare, values
from forwarder.config.plan import FIXED_SETTINGS
from forwarder.config.toml_conf import RULE_KEYS, TOP_KEYS

if TYPE_CHECKING:
    from forwarder.config.model import Config

RULE = '[[forwarding_rules]]\nname = "a"\nlisten = "127.0.0.1:1"\nupstream = "127.0.0.1:2"\n'


def config(text: str) -> Config:
    return parse(text, "x.toml", Dialect.TOML).config


def test_keys_are_those_of_the_format() -> None:
    """A new field with a key of another name belongs into the table of ``compare``."""
    given = config(RULE)
    assert {key for key, _ in values(given.rules[0])} <= set(RULE_KEYS)
    assert {key.partition(".")[0] for key, _ in values(given.settings)} <= set(TOP_KEYS)
    assert set(FIXED_SETTINGS) <= set(TOP_KEYS)


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ('idle_timeout = "1h"', ["idle_timeout 0 -> 3600"]),
        ('protocol = "udp"\ntimeout = 0.5', ["protocol tcp -> udp", "timeout 72 -> 0.5"]),
        ('source_address = "10.0.0.1"', ["source_address none -> 10.0.0.1"]),
        ('bind = "retry"', ["bind require -> retry"]),
        ("max_sessions = 7", ["max_sessions 0 -> 7"]),
        (
            'rules = [{ type = "deny", pattern = "10.*" }, { type = "allow", pattern = "::1" }]',
            ["rules none -> deny 10.*, allow ::1"],
        ),
    ],
)
def test_a_rule_is_compared_key_by_key(more: str, changes: list[str]) -> None:
    found = compare(config(RULE), config(RULE + more))
    assert [str(change) for change in found.rules["a"]] == changes
    assert found.plan.changed == ("a",)
    assert (found.settings, found.is_same) == ((), False)


def test_lists_of_upstreams_and_unix_permissions_are_readable() -> None:
    old = RULE.replace('"127.0.0.1:1"', '"unix:/run/a"')
    new = old.replace('"127.0.0.1:2"', '["127.0.0.1:2", "[::1]:3"]') + 'mode = "0600"'
    assert [str(change) for change in compare(config(old), config(new)).rules["a"]] == [
        "upstream 127.0.0.1:2 -> 127.0.0.1:2, [::1]:3",
        "mode 0660 -> 0600",
    ]


def test_settings_tell_whether_a_reload_takes_them_up() -> None:
    new = 'workers = 3\nrelay = "copy"\nlog_file = "/var/log/x"\n' + RULE
    found = compare(config(RULE), config(new))
    assert [str(change) for change in found.settings] == [
        "workers auto -> 3",
        "relay auto -> copy",
        "logs none -> /var/log/x (rinetd)",
    ]
    assert found.needs_restart == ("relay",)
    assert found.plan.unchanged == ("a",)


def test_global_access_changes_every_rule_and_is_told_once() -> None:
    new = 'global_rules = [{ type = "deny", pattern = "10.*" }]\n' + RULE
    found = compare(config(RULE), config(new))
    assert found.rules == {"a": ()}
    assert [str(change) for change in found.settings] == ["global_rules none -> deny 10.*"]


def test_order_comments_and_places_are_no_difference() -> None:
    other = RULE.replace('"a"', '"b"').replace(":1", ":3")
    assert compare(config(RULE + other), config(f"# new\n{other}\n{RULE}")).is_same
