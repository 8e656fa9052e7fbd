"""Conversion of rinetd.conf as a property of any file; the formats are told apart."""

from __future__ import annotations

import builtins
import socket
import tomllib
from pathlib import PurePath
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from forwarder.config import Dialect, parse
from forwarder.errors import ConfigError
from forwarder.migrate import Kind, Outside, convert, guess
from forwarder.migrate.converting import NoYamlError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OUTSIDE = Outside(service_port=socket.getservbyname, find=lambda *_: [])

BLANKS = st.sampled_from([" ", "\t", "  \t "])
COMMENT_TEXT = st.text(
    st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), max_size=12
)
COMMENTS = COMMENT_TEXT.map("#{}".format)
HOSTS = st.sampled_from(["0", "0.0.0.0", "127.0.0.1", "::1", "[2001:db8::1]", "a.example", "b_c."])
PORTS = st.builds(
    "{}{}".format,
    st.one_of(st.integers(1, 65535).map(str), st.sampled_from(["http", "domain"])),
    st.sampled_from(["", "/tcp", "/udp"]),
)
PATTERNS = st.sampled_from(["10.*", "10.0.0.0/8", "192.0.2.?", "::1", "fe80:*", "*"])
ACCESS = st.builds("{} {}".format, st.sampled_from(["allow", "deny"]), PATTERNS)
NAMES = st.sampled_from(["/a/b", '"/a b/c"', "x#y", '"\\"', "'", "/\u00e9"])
DIRECTIVES = st.one_of(
    st.just("logcommon"),
    st.builds("{} {}".format, st.sampled_from(["logfile", "pidfile", "pidlogfile"]), NAMES),
)
OPTIONS = st.sampled_from(["", "[timeout=0]", "[timeout=5]", " [ src = 10.0.0.9 , timeout=30]"])


@st.composite
def rules(draw: st.DrawFn) -> str:
    words = [draw(HOSTS), draw(PORTS), draw(HOSTS), draw(PORTS)]
    line = words[0]
    for word in words[1:]:
        line += draw(BLANKS) + word
    return line + draw(OPTIONS)


STATEMENTS = st.one_of(rules(), ACCESS, DIRECTIVES, st.just(""))
LINES = st.builds(
    lambda statement, comment: f"{statement} {comment}".rstrip(" "),
    STATEMENTS,
    st.one_of(st.just(""), COMMENTS),
)
FILES = st.lists(LINES, max_size=12).map("\n".join)


@given(FILES)
def test_a_converted_rinetd_conf_means_the_same(text: str) -> None:
    try:
        before = parse(text, "x.conf", Dialect.RINETD).config
    except ConfigError:
        assume(False)
    assume(before.rules)  # rinetd.conf may lack them, TOML not
    converted = convert(text, "x.conf", Kind.RINETD, OUTSIDE)
    assert parse(converted.text, "x.toml", Dialect.TOML).config == before


@given(st.lists(st.one_of(COMMENTS, st.just("127.0.0.1 {} ::1 80")), min_size=1, max_size=9))
def test_no_comment_is_lost_and_their_order_stays(lines: list[str]) -> None:
    numbered = [line.replace("{}", str(at)) for at, line in enumerate(lines, 1)]
    assume(any(not line.startswith("#") for line in numbered))
    comments = [line.rstrip() for line in numbered if line.startswith("#")]
    found = convert("\n".join(numbered), "x.conf", Kind.RINETD, OUTSIDE).text.split("\n")
    kept = [line for line in found if line.startswith("#")]
    printable = ["".join(c if c == "\t" or c.isprintable() else "?" for c in c_) for c_ in comments]
    assert kept == printable
    tomllib.loads("\n".join(found))


def test_what_cannot_be_read_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        convert("127.0.0.1 80 ::1 80\nallow [::1]\n", "x.conf", Kind.RINETD, OUTSIDE)
    assert [str(issue.place) for issue in caught.value.issues if not issue.is_warning] == [
        "x.conf:2:7"
    ]


def test_what_our_format_cannot_hold_is_refused() -> None:
    text = "127.0.0.1 80 ::1 80\npidfile /a\x7fb\n"
    with pytest.raises(ConfigError, match=r"x\.conf, converted"):
        convert(text, "x.conf", Kind.RINETD, OUTSIDE)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.yaml", "", Kind.UV_YAML),
        ("a.yml", "", Kind.UV_YAML),
        ("a.toml", "", Kind.OXIDINETD),
        ("rinetd.conf", "0.0.0.0 80 10.0.0.1 80 [timeout=5]\nallow 10.*", Kind.RINETD),
        ("rinetd.conf", "# unix:/run/x\nlogfile /x", Kind.RINETD),
        ("rinetd.conf", "0.0.0.0 80 unix:/run/x", Kind.UV_CONF),
        ("rinetd.conf", "0.0.0.0 80 10.0.0.1 80 [timeout=5, keepalive = off]", Kind.UV_CONF),
        ("rinetd.conf", "  buffersize 1024", Kind.UV_CONF),
        ("rinetd-uv.conf", "include conf.d/*", Kind.UV_CONF),
    ],
)
def test_the_format_is_told_by_name_and_words(name: str, text: str, kind: Kind) -> None:
    assert guess(PurePath(name), text) is kind


def test_a_missing_pyyaml_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_yaml(
        name: str,
        globals_: Mapping[str, object] | None = None,
        locals_: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> object:
        if name == "forwarder.migrate" and fromlist and "uv_yaml" in fromlist:
            raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
        return real(name, globals_, locals_, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    with pytest.raises(NoYamlError, match="pip install PyYAML"):
        convert("rules: []\n", "x.yaml", Kind.UV_YAML, OUTSIDE)
