"""Loading: files that are no configuration, address pairs, and that no text ends in a crash."""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config import Dialect, Loaded, from_pairs, load, loading, parse
from forwarder.config.address import Address
from forwarder.config.model import Protocol, Upstream
from forwarder.config.raw import MAX_ISSUES
from forwarder.config.toml_conf import RULE_KEYS
from forwarder.errors import ConfigError, Issue

if TYPE_CHECKING:
    from pathlib import Path

RULE = "0.0.0.0 80 10.0.0.1 80\n"
TOML_RULE = '[[forwarding_rules]]\nlisten = "0.0.0.0:80"\nupstream = "10.0.0.1:80"\n'

RINETD_PIECES = st.sampled_from(
    [
        "allow",
        "deny",
        "logfile",
        "logcommon",
        "pidfile",
        "0.0.0.0",
        "::1",
        "[::1]",
        "80",
        "53/udp",
        "53/tcp",
        "80-90",
        "unix:/a",
        "http",
        "host.example",
        "[timeout=5, src=10.0.0.1]",
        "[",
        "]",
        "timeout=",
        ",",
        "#",
        '"',
        "10.*",
        " ",
        "\t",
        "\n",
        "\r\n",
        "\x0b",
        "\x85",
        "é",
    ]
)
TOML_PIECES = st.sampled_from(
    [
        "[[forwarding_rules]]\n",
        "[[global_rules]]\n",
        "[forwarding_rules.rules]\n",
        "[[forwarding_rules.rules]]\n",
        'listen = "0.0.0.0:80"\n',
        'upstream = ["a:1", "b:2"]\n',
        'listen = "[::1]:80-90"\n',
        'listen = "unix:/run/a"\n',
        'upstream = "unix:@b"\n',
        'bind_port = "80-70"\n',
        'mode = "0660"\n',
        'framing = "length"\n',
        'answers = "one"\n',
        'bind = "retry"\n',
        "max_flows = 7\n",
        "[[groups]]\n",
        "[groups.check]\n",
        "[checks]\n",
        "commands = true\n",
        'servers = ["a:1", { at = "b:2", weight = 0 }]\n',
        'upstream = "group:a"\n',
        'upstream = { at = "unix:/a", backup = true }\n',
        'name = "a"\n',
        'check = "https://a/"\n',
        'kind = "http"\n',
        'balance = "hash"\n',
        "{ at = ",
        "bind_port = 80\n",
        'type = "deny"\n',
        'pattern = "10.*"\n',
        "workers",
        "=",
        "1",
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        '"""',
        "'''",
        "\\",
        "#",
        "\n",
        " ",
        ".",
        "rules",
        "name",
        "1979-05-27",
        "nan",
        "true",
        "\r\n",
        "\x85",
        "é",
    ]
)


def issues_of(path: Path) -> tuple[Issue, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return caught.value.issues


def only_issue_of(path: Path) -> Issue:
    (issue,) = issues_of(path)
    assert issue.place.source == str(path)
    return issue


@pytest.mark.parametrize("dialect", Dialect)
@given(data=st.data())
def test_any_text_is_loaded_or_refused_with_places(dialect: Dialect, data: st.DataObject) -> None:
    pieces = RINETD_PIECES if dialect is Dialect.RINETD else TOML_PIECES
    text = data.draw(st.one_of(st.text(), st.lists(pieces, max_size=30).map("".join)))
    lines = text.count("\n") + 1
    try:
        issues = parse(text, "file", dialect).warnings
    except ConfigError as error:
        issues = error.issues
        assert any(not issue.is_warning for issue in issues)
    for issue in issues:
        assert issue.place.source == "file"
        assert 0 <= issue.place.line <= lines
        assert issue.what
    assert list(issues) == sorted(issues, key=lambda one: (one.place.line, one.place.column))


KEYS = st.sampled_from(["a", "b-c", '"d e"', "'f'", "g.h", '"\\u0069"'])
SCALARS = st.sampled_from(
    [
        "1",
        "-1.5",
        "true",
        '"x"',
        '"[{#\\""',
        "'\\'",
        '"""\n[a]\n""""',
        "'''\nb = 1\n'''",
        "07:32:00",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[ # ]\n{' , '.join(items)}\n]"),
        inner.map(lambda value: f"{{ k = {value} }}"),
    ),
    max_leaves=5,
)
STATEMENTS = st.one_of(
    st.builds("{} = {} # [c]".format, KEYS, VALUES),
    st.builds("[[t.{}]]".format, KEYS),
    st.builds("[{}]".format, KEYS),
)


@given(st.lists(STATEMENTS, max_size=8).map("\n".join))
def test_every_unknown_key_is_found_where_it_stands(text: str) -> None:
    """Each top-level key is unknown here. Result: its issue points at a line that names it."""
    try:
        keys = list(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return
    with pytest.raises(ConfigError) as caught:
        parse(text, "file", Dialect.TOML)
    unknown = [issue for issue in caught.value.issues if issue.what.startswith("unknown key")]
    assert len(unknown) == len(keys)
    lines = text.split("\n")
    for issue in unknown:
        key = issue.what.removeprefix("unknown key ").strip("'")
        assert issue.place.line > 0
        at = lines[issue.place.line - 1][issue.place.column - 1 :].lstrip("[")
        assert at.startswith((key, f'"{key}', f"'{key}")) or (key == "i" and at[1:7] == "\\u0069")


def test_the_name_decides_the_dialect_and_an_argument_overrides_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML_RULE)
    (tmp_path / "b.conf").write_text(TOML_RULE)
    (tmp_path / "c.toml").write_text(RULE)
    expected = load(tmp_path / "a.toml").config
    assert load(tmp_path / "b.conf", dialect=Dialect.TOML).config == expected
    assert load(tmp_path / "c.toml", dialect=Dialect.RINETD).config == expected
    with pytest.raises(ConfigError):
        load(tmp_path / "b.conf")


def test_moving_a_rule_to_another_line_does_not_change_it() -> None:
    here = parse(RULE, "file", Dialect.RINETD)
    there = parse("\n\n" + RULE, "other", Dialect.RINETD)
    assert here.config == there.config
    assert here.config.rules[0].place != there.config.rules[0].place


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TOML_RULE.encode())
    assert load(path).config.rules
    path.write_bytes(b"\xef\xbb\xbf# ok\n# \xff")
    issue = only_issue_of(path)
    assert (issue.place.line, issue.place.column) == (2, 3)
    assert "0xff" in issue.what


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    assert "does not exist" in only_issue_of(tmp_path / "none.conf").what
    assert "a directory" in only_issue_of(tmp_path).what
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in only_issue_of(tmp_path / "pipe").what
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in only_issue_of(tmp_path / "loop").what
    blank = tmp_path / "blank.conf"
    blank.write_text(" \n\t\n")
    assert "is empty" in only_issue_of(blank).what


def test_a_file_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.conf"
    path.write_text(RULE)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    # A real mode would not stop a test that runs as root.
    monkeypatch.setattr(type(path), "open", refuse)
    assert "permission denied" in only_issue_of(path).what


def test_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.conf"
    path.write_text(RULE)
    monkeypatch.setattr(loading, "MAX_FILE_BYTES", len(RULE))
    assert load(path).config.rules
    monkeypatch.setattr(loading, "MAX_FILE_BYTES", len(RULE) - 1)
    assert "longer than" in only_issue_of(path).what


def test_deep_brackets_and_long_numbers_are_errors_not_crashes(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("a = " + "[" * 100_000)
    assert "nested too deep" in only_issue_of(path).what
    path.write_text("a = " + "9" * 5000)
    assert "not valid TOML" in only_issue_of(path).what
    path.write_text(f"workers = 0x{'f' * 5000}\n{TOML_RULE}")
    assert "thousands of digits" in only_issue_of(path).what


def test_endless_problems_are_counted_not_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("x\n" * (MAX_ISSUES + 5), "file", Dialect.RINETD)
    assert len(caught.value.issues) == MAX_ISSUES + 1
    assert "5 more problems" in caught.value.issues[-1].what


def test_an_error_behind_too_many_warnings_is_still_an_error() -> None:
    warned = "".join(f"0 {port} 1.1.1.1 80 [timeout=1]\n" for port in range(1, MAX_ISSUES + 5))
    assert len(parse(warned, "file", Dialect.RINETD).warnings) == MAX_ISSUES + 1
    with pytest.raises(ConfigError, match="neither a forwarding rule"):
        parse(f"{warned}x\n", "file", Dialect.RINETD)


def test_pairs_become_tcp_rules() -> None:
    loaded: Loaded = from_pairs([":80", "[::1]:81"], ["10.0.0.1:80", "web.example:81"])
    assert [str(rule.listen) for rule in loaded.config.rules] == ["[::]:80", "[::1]:81"]
    assert [str(rule.upstreams[0]) for rule in loaded.config.rules] == [
        "10.0.0.1:80",
        "web.example:81",
    ]
    assert {rule.protocol for rule in loaded.config.rules} == {Protocol.TCP}
    assert {rule.place.source for rule in loaded.config.rules} == {"--listen"}


@pytest.mark.parametrize(
    ("listens", "remotes", "whats"),
    [
        ([":80"], [], ["1 listen and 0 remote addresses are given"]),
        ([], [], ["there is no forwarding rule"]),
        (["x"], ["*:80"], ["'x' has no port", "'*:80' does not say which host to connect to"]),
        (
            [":80", "*:80"],
            ["a:1", "b:1"],
            ["tcp [::]:80 is already listened on by the rule at --listen"],
        ),
    ],
)
def test_pairs_with_problems(listens: list[str], remotes: list[str], whats: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_pairs(listens, remotes)
    assert [issue.what for issue in caught.value.issues] == whats


TRANSPORTS = st.sampled_from(["", "/tcp", "/udp"])
PROTOCOLS = {
    (False, False): Protocol.TCP,
    (True, True): Protocol.UDP,
    (True, False): Protocol.UDP_TO_TCP,
    (False, True): Protocol.TCP_TO_UDP,
}


@given(st.integers(1, 65535), TRANSPORTS, st.integers(1, 65535), TRANSPORTS)
def test_suffixes_of_rinetd_say_the_protocol_of_their_side(
    port: int, here: str, there_port: int, there: str
) -> None:
    """Nothing means TCP. Result: a warning exactly where one side alone says UDP."""
    text = f"0.0.0.0 {port}{here} 10.0.0.1 {there_port}{there}\n"
    loaded = parse(text, "file", Dialect.RINETD)
    (rule,) = loaded.config.rules
    sides = here == "/udp", there == "/udp"
    assert rule.protocol is PROTOCOLS[sides]
    assert (rule.listen, rule.upstreams) == (
        Address("0.0.0.0", port),
        (Upstream(Address("10.0.0.1", there_port)),),
    )
    assert len(loaded.warnings) == (sides[0] is not sides[1])
    suffix = {False: "/tcp", True: "/udp"}
    again = text.replace(f"{port}{here} ", f"{port}{suffix[sides[0]]} ", 1)
    assert parse(again, "file", Dialect.RINETD).config == loaded.config


VALUES_OF_RULES = st.one_of(
    st.integers(-1, 70000).map(str),
    st.sampled_from(
        [
            '"tcp"',
            '"udp"',
            '"udptotcp"',
            '"raw"',
            '"length"',
            '"retry"',
            '"require"',
            '"0660"',
            "true",
            "[]",
            '["unix:/a", "b:1-2", 7]',
        ]
    ),
    st.text(alphabet="0123456789-:.[]*@/aunix", max_size=20).map(lambda text: f'"{text}"'),
    st.text(alphabet="0123456789-", max_size=9).map(lambda text: f'"unix:/{text}"'),
    st.text(alphabet="0123456789-", max_size=9).map(lambda text: f'"[::1]:{text}"'),
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(RULE_KEYS), VALUES_OF_RULES, max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_every_problem_of_a_rule_has_a_line_and_a_column(rules: list[dict[str, str]]) -> None:
    """Result: a place inside the rule, on the line of its header or of one of its keys."""
    lines: list[str] = []
    for rule in rules:
        lines += ["[[forwarding_rules]]", *(f"{key} = {value}" for key, value in rule.items())]
    issues: tuple[Issue, ...]
    try:
        issues = parse("\n".join(lines), "file", Dialect.TOML).warnings
    except ConfigError as error:
        issues = error.issues
    for issue in issues:
        assert 1 <= issue.place.line <= len(lines), issue
        line = lines[issue.place.line - 1]
        assert 1 <= issue.place.column <= len(line), issue


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 60), st.integers(1, 20)), max_size=12
    )
)
def test_rules_whose_ports_overlap_are_found(rules: list[tuple[str, int, int]]) -> None:
    """Against the plain way, every rule with every other.

    Result: only pairs that overlap are reported, and every rule that does is in one of them.
    """
    lines = []
    for host, first, count in rules:
        listen = f"{host}:{first}-{first + count - 1}"
        lines += ["[[forwarding_rules]]", f'listen = "{listen}"', 'upstream = "c:1"']
    pairs = [
        (i, j)
        for i, one in enumerate(rules)
        for j, other in enumerate(rules[:i])
        if one[0] == other[0] and one[1] < other[1] + other[2] and other[1] < one[1] + one[2]
    ]
    found = set()
    try:
        parse("\n".join(lines) or "\n", "file", Dialect.TOML)
    except ConfigError as error:
        for issue in error.issues:
            if "rule at file:" in issue.what:
                there = int(issue.what.split("file:")[1].split(":")[0])
                found.add(((issue.place.line - 2) // 3, (there - 2) // 3))
    assert found <= set(pairs)
    assert {i for pair in found for i in pair} == {i for pair in pairs for i in pair}


def test_ten_thousand_rules_are_compared_with_each_other_quickly() -> None:
    """Ranges, too. Result: the one overlap is found, in far less than a comparison of all pairs."""
    rule = '[[forwarding_rules]]\nlisten = "127.0.0.1:{}-{}"\nupstream = "10.0.0.1:1"\n'
    text = "".join(rule.format(port, port + 2) for port in range(1000, 31_000, 3))
    with pytest.raises(ConfigError) as caught:
        parse(text + rule.format(5002, 5002), "file", Dialect.TOML)
    (issue,) = caught.value.issues
    assert issue.place.line == 30_002
    assert "127.0.0.1:5002-5004" in issue.what or "127.0.0.1:5000-5002" in issue.what


def test_bind_of_a_rule_wins_over_that_of_the_file() -> None:
    def text(top: str, rule: str) -> str:
        return f'{top}\n[[forwarding_rules]]\nlisten = "a:1"\nupstream = "b:1"\n{rule}\n'

    retry, require = 'bind = "retry"', 'bind = "require"'
    for top, rule, expected in [
        ("", "", False),
        (retry, "", True),
        (retry, require, False),
        (require, retry, True),
    ]:
        loaded = parse(text(top, rule), "file", Dialect.TOML)
        assert loaded.config.rules[0].retries_bind is expected


def test_pairs_may_be_ranges_and_unix_sockets() -> None:
    loaded = from_pairs(
        ["127.0.0.1:80-82", "unix:/run/a", "unix:@b"], ["a:180-182", "unix:@c", "b:1"]
    )
    assert [str(rule.listen) for rule in loaded.config.rules] == [
        "127.0.0.1:80-82",
        "unix:/run/a",
        "unix:@b",
    ]
    with pytest.raises(ConfigError, match=r"2 ports and .* has 3"):
        from_pairs(["127.0.0.1:80-82"], ["a:180-181"])


@pytest.mark.parametrize(
    ("listen", "remote", "is_udp", "expected"),
    [
        (":1", "a:1", False, Protocol.TCP),
        (":1", "a:1", True, Protocol.UDP),
        ("udp::1", "a:1", False, Protocol.UDP),
        (":1", "a:1/udp", False, Protocol.UDP),
        ("udp::1", "tcp:a:1", False, Protocol.UDP_TO_TCP),
        ("tcp://:1", "udp://a:1", False, Protocol.TCP_TO_UDP),
        (":1", "tcp:a:1", True, Protocol.UDP_TO_TCP),
        ("tcp:1", "a:1", True, Protocol.TCP_TO_UDP),
    ],
)
def test_pairs_say_what_is_spoken_on_the_two_sides(
    listen: str, remote: str, is_udp: bool, expected: Protocol
) -> None:
    """What one side alone says holds for both, unless --udp speaks for the other."""
    (rule,) = from_pairs([listen], [remote], is_udp=is_udp).config.rules
    assert rule.protocol is expected
    assert (str(rule.listen), str(rule.upstreams[0])) == ("[::]:1", "a:1")


def test_a_unix_socket_cannot_be_udp() -> None:
    with pytest.raises(ConfigError, match="is a stream socket, and the protocol of the rule is"):
        from_pairs(["udp:53"], ["unix:/run/dns"])


def test_a_number_to_listen_on_is_told_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r'listen is the number 80; .*hint: write "\*:80"'):
        parse('[[forwarding_rules]]\nlisten = 80\nupstream = "a:1"\n', "c.toml", Dialect.TOML)


@pytest.mark.parametrize(("text", "expected"), [("", False), ("true", True), ("false", False)])
def test_a_flag_is_true_or_false(text: str, expected: bool) -> None:
    line = f"cut_denied = {text}\n" if text else ""
    loaded = parse(line + TOML_RULE, "c.toml", Dialect.TOML)
    assert loaded.config.settings.cut_denied is expected


@pytest.mark.parametrize("value", ['"true"', "1", "[]"])
def test_anything_else_is_no_flag(value: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.toml:1:1: cut_denied is .*; allowed: true or"):
        parse(f"cut_denied = {value}\n{TOML_RULE}", "c.toml", Dialect.TOML)
