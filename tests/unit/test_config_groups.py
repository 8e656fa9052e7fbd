"""Groups of servers in a configuration: who shares them, what follows from what, how they are told.

What is refused, and with which words, is in ``tests/compat``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from forwarder.config import Dialect, parse, toml_upstreams
from forwarder.config.compare import as_lines, compare
from forwarder.config.describe import describe
from forwarder.config.model import Balance, Check, CheckKind, Config, Group, Rule
from forwarder.errors import ConfigError, Issue

RULE = '[[forwarding_rules]]\nname = "a"\nlisten = "127.0.0.1:1"\n'
OTHER = RULE.replace('"a"', '"b"').replace(":1", ":2")
LED = 'upstream = "group:pg"\n'
PG = '[[groups]]\nname = "pg"\nservers = ["10.0.0.1:5", "10.0.0.2:5"]\n'


def config(text: str) -> Config:
    return parse(text, "x.toml", Dialect.TOML).config


def only_rule(text: str) -> Rule:
    (rule,) = config(text).rules
    return rule


def errors_of(text: str) -> list[Issue]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.toml", Dialect.TOML)
    return [issue for issue in caught.value.issues if not issue.is_warning]


def check_of(text: str) -> Check:
    check = only_rule(f'{RULE}upstream = "10.0.0.1:5"\ncheck = {text}\n').group.check
    assert check is not None
    return check


def test_rules_that_lead_to_a_group_have_its_servers_and_its_name() -> None:
    first, second = config(RULE + LED + OTHER + LED + PG + 'balance = "least"\n').rules
    assert first.upstreams == second.upstreams
    assert first.group is second.group
    assert first.group == Group(name="pg", balance=Balance.LEAST)
    assert (first.group_name, second.group_name) == ("pg", "pg")


@pytest.mark.parametrize(
    ("more", "warns"),
    [("", True), ('check = { kind = "agent", port = 9 }\n', False)],
    ids=["", "agent"],
)
def test_a_queue_is_for_servers_that_can_be_full(more: str, warns: bool) -> None:
    """An agent may say how many sessions its server may have."""
    text = RULE + LED + PG + "max_queue = 5\n" + more
    found = parse(text, "x.toml", Dialect.TOML).warnings
    assert any("max_queue" in str(one) for one in found) is warns


def test_a_rule_with_servers_of_its_own_is_a_group_called_as_the_rule() -> None:
    rule = only_rule(RULE + 'upstream = ["10.0.0.1:5", "10.0.0.2:5"]\nbalance = "hash"\n')
    assert (rule.group_name, rule.group) == ("a", Group(balance=Balance.HASH))


@pytest.mark.parametrize(
    ("keys", "is_balanced"),
    [
        ('upstream = "10.0.0.1:5"\n', False),
        ('upstream = "10.0.0.1:5"\nattempt_delay = 0\nretries = 0\n', False),
        ('upstream = { at = "10.0.0.1:5" }\n', False),
        ('upstream = ["10.0.0.1:5"]\n', False),
        ('upstream = "10.0.0.1:5"\nretries = 1\n', True),
        ('upstream = "10.0.0.1:5"\ncheck = "tcp"\n', True),
        ('upstream = { at = "10.0.0.1:5", max_sessions = 1 }\n', True),
        ('upstream = ["10.0.0.1:5", "10.0.0.2:5"]\n', True),
        ('upstream = "group:one"\n[[groups]]\nname = "one"\nservers = ["10.0.0.1:5"]\n', True),
    ],
)
def test_only_what_has_something_to_choose_is_balanced(keys: str, is_balanced: bool) -> None:
    assert only_rule(RULE + keys).is_balanced is is_balanced


@pytest.mark.parametrize(
    ("written", "times"),
    [
        ("", (2, 1, 2, 2)),
        ('every = "500ms"', (0.5, 0.5, 0.5, 0.5)),
        ("every = 30", (30, 1, 30, 5)),
        ('every = 30\nfast = 10\ndown = "5s"\ntimeout = "20s"', (30, 10, 5, 20)),
    ],
)
def test_times_of_a_check_follow_from_how_often_it_is_made(
    written: str, times: tuple[float, ...]
) -> None:
    text = f'upstream = "10.0.0.1:5"\n[forwarding_rules.check]\nkind = "tcp"\n{written}\n'
    check = only_rule(RULE + text).group.check
    assert check is not None
    assert (check.every_s, check.fast_s, check.down_s, check.timeout_s) == times


def test_a_check_in_short_is_the_table_with_nothing_but_its_kind() -> None:
    for kind in ("tcp", "tls", "http", "udp", "redis", "smtp", "pgsql", "mysql", "dns"):
        assert check_of(f'"{kind}"') == check_of(f'{{ kind = "{kind}" }}')
    url = check_of('"http://app.example:8008/primary"')
    table = 'kind = "http", host = "app.example", port = 8008, path = "/primary"'
    assert url == check_of(f"{{ {table} }}")
    assert check_of('"https://app.example:8008/primary"') == check_of(
        f"{{ {table.replace('http', 'https')} }}"
    )


def test_a_text_to_send_is_the_same_however_toml_escapes_it() -> None:
    sent = {
        check_of(f'{{ kind = "tcp", send = {text} }}').send
        for text in ('"a\\r\\n"', "'a\\r\\n'", '"a\\\\r\\\\n"', "'a\\x0d\\x0a'")
    }
    assert sent == {b"a\r\n"}


def test_name_servers_are_asked_in_the_way_of_the_rules() -> None:
    group = PG + 'check = "dns"\n'
    udp = LED + 'protocol = "udp"\n'
    for rules, kind in (
        (RULE + LED, CheckKind.TCP),
        (RULE + udp, CheckKind.UDP),
        (RULE + LED + OTHER + udp, CheckKind.UDP),
    ):
        checks = {rule.group.check for rule in config(rules + group).rules}
        assert {check.kind for check in checks if check} == {kind}
        assert len(checks) == 1


def test_a_command_is_run_only_where_the_file_allows_commands() -> None:
    text = RULE + 'upstream = "10.0.0.1:5"\ncheck = { kind = "command", command = ["/bin/true"] }\n'
    (issue,) = errors_of(text)
    assert "a check runs a command" in issue.what
    assert errors_of("[checks]\ncommands = false\n" + text) == [
        replace(issue, place=replace(issue.place, line=issue.place.line + 2))
    ]
    assert config("[checks]\ncommands = true\n" + text).settings.runs_commands


def test_a_group_with_an_error_is_reported_once_and_not_as_missing() -> None:
    (issue,) = errors_of(RULE + LED + PG.replace('servers = ["10.0.0.1:5", "10.0.0.2:5"]', ""))
    assert issue.what == "a group lacks servers"


def test_a_rule_with_an_error_still_leads_to_its_group() -> None:
    with pytest.raises(ConfigError) as caught:
        config(RULE.replace("127.0.0.1:1", "nowhere") + LED + PG)
    assert len(caught.value.issues) == 1


def test_what_does_not_go_with_a_rule_is_reported_at_the_rule() -> None:
    group = PG.replace('"10.0.0.1:5"', '"unix:/run/a"')
    (issue,) = errors_of(RULE + LED + OTHER + LED + 'protocol = "udp"\n' + group)
    assert issue.place.line == (RULE + LED + OTHER).count("\n") + 1
    assert "unix:/run/a" in issue.what


@pytest.mark.parametrize(
    ("servers", "keys", "what"),
    [
        ('["10.0.0.1:5", "[::1]:5"]', "transparent = true", "the upstream [::1]:5 is IPv6"),
        ('["[::1]:5"]', 'source_address = "10.0.0.9"', "the upstream [::1]:5 is IPv6"),
        ('["10.0.0.1:5", "unix:@x"]', 'source_address = "10.0.0.9"', "cannot connect to unix:@x"),
        ('["10.0.0.1:5-6"]', "", "upstream 10.0.0.1:5-6 has 2 ports and 127.0.0.1:1 has 1"),
        ('["127.0.0.1:1"]', "", "is where this rule listens"),
        ('["224.0.0.1:5"]', "", "is a multicast or broadcast address"),
        ('["unix:@x"]', 'protocol = "tcptoudp"', "unix:@x is a stream socket"),
        ('["unix:@x"]', "upstream_mark = 1", "upstream_mark is an option of IP sockets"),
    ],
)
def test_servers_of_a_group_have_to_go_with_each_rule(servers: str, keys: str, what: str) -> None:
    """As if they were the rule's own. Result: an error at the rule, and none at another one."""
    group = f'[[groups]]\nname = "pg"\nservers = {servers}\n'
    other = OTHER.replace("127.0.0.1:2", "unix:/run/b") + LED if "unix" in servers else ""
    (issue,) = errors_of(f"{group}{other}{RULE}{LED}{keys}\n")
    assert what in issue.what
    assert issue.place.line > (group + other + RULE).count("\n")


def test_a_range_of_ports_may_be_a_server_of_rules_that_listen_on_as_many() -> None:
    rule = RULE.replace(":1", ":8000-8009") + LED
    group = PG.replace("10.0.0.1:5", "10.0.0.1:9000-9009")
    assert str(only_rule(rule + group).upstreams[0]) == "10.0.0.1:9000-9009"


def test_a_group_may_be_called_as_a_rule_that_leads_to_it() -> None:
    text = RULE + LED.replace("pg", "a") + PG.replace('"pg"', '"a"')
    assert only_rule(text).group_name == "a"


def test_a_changed_group_changes_its_rules_key_by_key() -> None:
    old = RULE + LED + PG
    new = (
        RULE
        + LED
        + '[[groups]]\nname = "pg"\n'
        + 'servers = ["10.0.0.1:5", { at = "10.0.0.3:5", weight = 2, backup = true }]\n'
        + 'slow_start = 30\nhash_prefix = "24/56"\nbalance = "hash"\nfail_open = false\n'
        + 'check = { kind = "redis", every = 5 }\n'
    )
    assert [str(change) for change in compare(config(old), config(new)).rules["a"]] == [
        "upstream group:pg (10.0.0.1:5, 10.0.0.2:5) -> "
        "group:pg (10.0.0.1:5, 10.0.0.3:5 (weight 2, backup))",
        "balance turn -> hash",
        "hash_prefix 32/128 -> 24/56",
        "slow_start 0 -> 30",
        "fail_open yes -> no",
        r"check none -> tcp, send PING\r\n, expect re:\A(?:\+PONG|-NOAUTH ), every 5 s",
    ]


def test_a_rule_whose_servers_become_a_group_is_changed() -> None:
    old = RULE + 'upstream = ["10.0.0.1:5", "10.0.0.2:5"]\n'
    assert [str(change) for change in compare(config(old), config(RULE + LED + PG)).rules["a"]] == [
        "upstream 10.0.0.1:5, 10.0.0.2:5 -> group:pg (10.0.0.1:5, 10.0.0.2:5)"
    ]


def test_a_new_rule_is_shown_with_the_servers_of_its_group() -> None:
    old, new = config(RULE + LED + PG), config(RULE + LED + OTHER + LED + PG)
    assert as_lines(compare(old, new), new, shows_all=False) == [
        "+ b: tcp 127.0.0.1:2 -> group:pg (10.0.0.1:5, 10.0.0.2:5)",
        "+1 -0 ~0 =1 rules",
    ]


def test_permission_for_commands_is_a_change_of_the_settings() -> None:
    old = RULE + LED + PG
    found = compare(config(old), config(f'state_file = "/x"\n[checks]\ncommands = true\n{old}'))
    assert [str(change) for change in found.settings] == [
        "checks.commands no -> yes",
        "state_file none -> /x",
    ]
    assert found.plan.unchanged == ("a",)


def test_a_group_is_described_once_and_its_rules_name_it() -> None:
    text = RULE + LED + OTHER + LED + PG + 'on_down = "reset"\ncheck = "http://:8008/primary"\n'
    assert describe(config(text), "x")[1:] == [
        "group:pg: 10.0.0.1:5, 10.0.0.2:5, on_down reset, check (http, port 8008, path /primary)",
        "a: tcp 127.0.0.1:1 -> group:pg",
        "b: tcp 127.0.0.1:2 -> group:pg",
    ]


def test_servers_of_a_rule_are_described_with_it() -> None:
    servers = '["10.0.0.1:5", { at = "10.0.0.2:5", weight = 0, max_sessions = 9 }]'
    text = f'{RULE}upstream = {servers}\nbalance = "least"\nretries = 1\n'
    assert describe(config(text), "x")[1:] == [
        "a: tcp 127.0.0.1:1 -> 10.0.0.1:5, 10.0.0.2:5 (weight 0, at most 9 sessions), "
        "balance least, retries 1"
    ]


# -- names that stand for several servers


def test_a_service_is_a_group_of_servers_that_are_not_known_yet() -> None:
    rule = only_rule(RULE + 'upstream = "srv:_pg._tcp.db.example"\nbalance = "least"\n')
    assert [str(one) for one in rule.upstreams] == ["srv:_pg._tcp.db.example"]
    assert rule.upstreams[0].is_several
    assert rule.is_balanced


def test_keys_that_need_several_servers_have_an_effect_on_a_name_that_stands_for_them() -> None:
    for upstream in ('"srv:_pg._tcp.db.example"', '{ at = "db.example:5432", expand = true }'):
        text = f'{RULE}upstream = {upstream}\nbalance = "hash"\npanic = 30\non_up = "return"\n'
        assert parse(text, "x.toml", Dialect.TOML).warnings == ()


def test_a_name_is_one_server_unless_it_is_expanded() -> None:
    assert not only_rule(
        f'{RULE}upstream = {{ at = "db.example:5", expand = false }}\n'
    ).is_balanced
    assert only_rule(f'{RULE}upstream = {{ at = "db.example:5", expand = true }}\n').is_balanced


def test_a_service_needs_the_extra_that_looks_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toml_upstreams, "find_spec", lambda _: None)
    (issue,) = errors_of(RULE + 'upstream = "srv:_pg._tcp.db.example"\n')
    assert "splice-forwarder[dns]" in issue.hint
    assert only_rule(f'{RULE}upstream = {{ at = "db.example:5", expand = true }}\n').is_balanced


def test_a_change_of_expand_is_said_in_the_words_of_the_file() -> None:
    old = config(f'{RULE}upstream = {{ at = "db.example:5", weight = 4 }}\n')
    new = config(f'{RULE}upstream = {{ at = "db.example:5", weight = 4, expand = true }}\n')
    (line, *_) = [one for one in as_lines(compare(old, new), new, shows_all=False) if "->" in one]
    assert line.strip() == (
        "upstream db.example:5 (weight 4) -> db.example:5 (weight 4, each address a server)"
    )
