"""The check of a group in its TOML table: in short, as a text, or as a table of its own."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from forwarder.config import presets
from forwarder.config.check_values import BYTES_FORMS, EXPECT_FORMS, parse_bytes, parse_expected
from forwarder.config.keys import OF_A_CHECK, read_keys, values_of
from forwarder.config.model import EVERY_S, Check, CheckKind
from forwarder.config.raw import RawCheck
from forwarder.config.toml_table import describe
from forwarder.config.toml_values import quantity

if TYPE_CHECKING:
    from forwarder.config.check_values import Expected
    from forwarder.config.raw import RawKeys
    from forwarder.config.toml_table import Table

CHECK_KEYS: Final = tuple(sorted((*OF_A_CHECK, "expect", "kind", "send")))

_ALWAYS: Final = frozenset(
    {"kind", "every", "fast", "down", "timeout", "fall", "rise", "jitter", "start"}
)
_OF_KIND: Final = {
    "tcp": {"port", "send", "expect"},
    "tls": {"port", "host", "verify", "send", "expect"},
    "http": {"port", "host", "path", "status"},
    presets.HTTPS: {"port", "host", "path", "status", "verify"},
    "udp": {"port", "send", "expect"},
    "command": {"command"},
    "agent": {"port", "send"},
}
_OF_A_PRESET: Final = {"port"}
# What there is no default for.
_NEEDED: Final = {"command": "command", "agent": "port", presets.HTTPS: "host"}
_NONE: Final = Check(kind=CheckKind.TCP)
_MOST_FAST_S: Final = 1.0
_MOST_TIMEOUT_S: Final = 5.0


def read_check(table: Table) -> RawCheck | None:
    """The check of a group or of a rule; None if it has none."""
    value = table.get("check")
    if value is None:
        return None
    if isinstance(value, str):
        found = _in_short(table, value)
    else:
        inner = table.table("check", CHECK_KEYS, presets.SHORT_FORMS)
        found = _from_table(inner) if inner else None
    return found or RawCheck(check=_NONE, place=table.place("check"), is_broken=True)


def _in_short(table: Table, text: str) -> RawCheck | None:
    place = table.place("check")
    if "://" in text:
        try:
            return RawCheck(check=presets.parse_url(text), place=place)
        except ValueError as error:
            what = f"check: {describe(text)} {error}"
            table.issues.error(place, what, allowed='a URL such as "http://:8008/health"')
            return None
    if text in _NEEDED:
        what = f'check = "{text}" does not say which {_NEEDED[text]}'
        example = f'check = {{ kind = "{text}", {_NEEDED[text]} = ... }}'
        table.issues.error(place, what, hint=f"write {example}")
        return None
    if text not in presets.KINDS:
        table.bad("check", presets.SHORT_FORMS, _likely(text))
        return None
    return RawCheck(check=_plain(text), place=place, is_dns=text == presets.DNS)


def _likely(text: str) -> str:
    near = get_close_matches(text.lower(), presets.KINDS, 1)
    return f'did you mean "{near[0]}"?' if near else ""


def _plain(kind: str) -> Check:
    """A check with nothing said but its kind."""
    if kind == presets.HTTPS:
        return Check(kind=CheckKind.HTTP)
    if kind == presets.DNS:
        return presets.dns(is_udp=False)
    return presets.PRESETS[kind] if kind in presets.PRESETS else Check(kind=CheckKind(kind))


def _from_table(table: Table) -> RawCheck | None:
    allowed = ", ".join(f'"{kind}"' for kind in presets.KINDS)
    given = read_keys(table, OF_A_CHECK)
    send, expected = _texts(table)
    if "kind" not in table:
        table.issues.error(table.place(), "a check lacks kind", allowed=allowed)
        return None
    kind = table.text("kind", allowed)
    if kind is None:
        return None
    if kind.value not in presets.KINDS:
        table.bad("kind", allowed, _likely(kind.value))
        return None
    if not _has_its_keys(table, kind.value):
        return None
    fields: dict[str, object] = {**_times(given), **values_of(Check, given, OF_A_CHECK)}
    check = replace(_plain(kind.value), **fields)  # type: ignore[arg-type]  # as each is read
    if send:
        check = replace(check, send=send)
    if expected:
        check = replace(check, expect=expected.text, is_pattern=expected.is_pattern)
    if kind.value == presets.HTTPS:
        if not check.host:  # wrong, and reported
            return None
        check = presets.by_tls(check)
    return RawCheck(check=check, place=table.place(), is_dns=kind.value == presets.DNS)


def _texts(table: Table) -> tuple[bytes, Expected | None]:
    """What is sent, and what has to come back."""
    send, expect = quantity(parse_bytes, BYTES_FORMS), quantity(parse_expected, EXPECT_FORMS)
    sent = send(table, "send") if "send" in table else None
    expected = expect(table, "expect") if "expect" in table else None
    return sent.value if sent else b"", expected.value if expected else None


def _has_its_keys(table: Table, kind: str) -> bool:
    """Whether the kind has the keys that it needs, and none that are for others."""
    own = _OF_KIND.get(kind, _OF_A_PRESET)
    is_right = True
    for key in table:
        if key in _ALWAYS or key in own or key not in CHECK_KEYS:
            continue
        others = [f'"{other}"' for other, keys in _OF_KIND.items() if key in keys]
        table.issues.error(
            table.place(key),
            f'{key} in a check of kind "{kind}"',
            allowed=f"{key} where kind is {', '.join(others)}",
            hint="leave it out",
        )
        is_right = False
    needed = _NEEDED.get(kind)
    if needed and needed not in table:
        what = f'a check of kind "{kind}" lacks {needed}'
        table.issues.error(table.place("kind"), what, hint=f"add {needed}")
        is_right = False
    return is_right


def _times(given: RawKeys) -> dict[str, float]:
    """Times that follow from how often it is checked, unless they are given."""
    every = given.get("every")
    every_s = every.value if every and isinstance(every.value, float) else EVERY_S
    return {
        "fast_s": min(every_s, _MOST_FAST_S),
        "down_s": every_s,
        "timeout_s": min(every_s, _MOST_TIMEOUT_S),
    }
