"""What a session needs of its rule for the rest of its life: a rule as JSON, and back. Pure.

The worker that a session comes to may serve another rule by that name, or none. Checks, weights and
limits are left out: those in force where the session is now count.
"""

from __future__ import annotations

from dataclasses import fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.config.address import SRV, Address, parse_listen, parse_service, parse_upstream
from forwarder.config.model import (
    AccessRule,
    Answers,
    Framing,
    Group,
    Limits,
    Protocol,
    Rule,
    SocketOptions,
    Upstream,
    Verdict,
)
from forwarder.config.patterns import parse_pattern
from forwarder.errors import Place
from forwarder.relay.moving.parcel import read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forwarder.config.address import Endpoint
    from forwarder.relay.moving.parcel import Json

_PLACE: Final = Place("another worker")
# What is a number or a text both here and there, with its default.
_PLAIN: Final[tuple[str, ...]] = (
    "connect_timeout_s",
    "half_close_timeout_s",
    "idle_timeout_s",
    "udp_timeout_s",
    "max_flows",
)
_OPTIONS: Final = {one.name: one for one in fields(SocketOptions) if one.name != "places"}
_EMPTY: Final = Rule(
    name="",
    listen=Address("127.0.0.1", 1),
    upstreams=(Upstream(Address("127.0.0.1", 1)),),
    place=_PLACE,
)


def terms_of(rule: Rule) -> dict[str, object]:
    """A rule as JSON: what is not the default."""
    found: dict[str, object] = {
        "name": rule.name,
        "listen": str(rule.listen),
        "upstreams": [str(one) for one in rule.upstreams],
    }
    if rule.has_members:
        found["written"] = list(dict.fromkeys(str(one.origin or one) for one in rule.upstreams))
    given = {key: getattr(rule, key) for key in _PLAIN} | {
        "protocol": rule.protocol.value,
        "framing": rule.framing.value,
        "answers": rule.answers.value,
        "group": rule.group.name,
        "source": rule.source,
        "bandwidth": rule.limits.bandwidth,
        "access": [[one.verdict.value, one.pattern] for one in rule.access],
        "options": _options_of(rule.options),
    }
    return found | {key: value for key, value in given.items() if value != _DEFAULTS[key]}


def size_of(terms: Json) -> int:
    """How many upstreams and access rules are named in terms: what makes them long."""
    lists = (terms.get(key) for key in ("upstreams", "written", "access"))
    return sum(len(one) for one in lists if isinstance(one, list))


def _options_of(options: SocketOptions) -> dict[str, object]:
    values = ((key, getattr(options, key), one.default) for key, one in _OPTIONS.items())
    return {
        key: value.value if isinstance(value, Enum) else value
        for key, value, default in values
        if value != default
    }


_DEFAULTS: Final[dict[str, object]] = {key: getattr(_EMPTY, key) for key in _PLAIN} | {
    "protocol": _EMPTY.protocol.value,
    "framing": _EMPTY.framing.value,
    "answers": _EMPTY.answers.value,
    "group": "",
    "source": None,
    "bandwidth": 0.0,
    "access": [],
    "options": {},
}


def rule_of(terms: Json) -> Rule:
    """The rule again, as far as a session needs it. Raises ValueError for nonsense."""
    source = terms.get("source")
    if not (source is None or isinstance(source, str)):
        raise ValueError("not a source")
    plain = {key: read(terms, key, getattr(_EMPTY, key)) for key in _PLAIN}
    return replace(
        _EMPTY,
        name=read(terms, "name", ""),
        listen=parse_listen(read(terms, "listen", "")),
        upstreams=tuple(_upstreams(terms)),
        protocol=Protocol(terms.get("protocol", _EMPTY.protocol.value)),
        framing=Framing(terms.get("framing", _EMPTY.framing.value)),
        answers=Answers(terms.get("answers", _EMPTY.answers.value)),
        group=Group(name=read(terms, "group", "")),
        limits=Limits(bandwidth=read(terms, "bandwidth", 0.0)),
        source=source,
        access=tuple(_access(terms.get("access", []))),
        options=_options(terms.get("options", {})),
        **plain,
    )


def _texts(content: object) -> list[str]:
    if not (isinstance(content, list) and all(isinstance(one, str) for one in content)):
        raise ValueError("not a list of texts")
    return content


def _upstreams(terms: Json) -> list[Upstream]:
    found = [Upstream(_upstream(text)) for text in _texts(terms.get("upstreams"))]
    if not found:
        raise ValueError("a rule without an upstream")
    return found


def _upstream(text: str) -> Endpoint:
    return parse_service(text) if text.startswith(SRV) else parse_upstream(text)


def _access(content: object) -> list[AccessRule]:
    if not isinstance(content, list):
        raise ValueError("not access rules")  # noqa: TRY004 - as all nonsense
    found = []
    for one in content:
        verdict, pattern = _texts(one)
        parse_pattern(pattern)
        found.append(AccessRule(verdict=Verdict(verdict), pattern=pattern, place=_PLACE))
    return found


def _options(content: object) -> SocketOptions:
    """Options of sockets; what only another version knows is left out."""
    if not isinstance(content, dict):
        raise ValueError("not options of sockets")  # noqa: TRY004 - as all nonsense
    given: dict[str, object] = {}
    for key, value in content.items():
        one = _OPTIONS.get(key)
        if one is None:
            continue
        if isinstance(one.default, Enum):
            given[key] = type(one.default)(value)
        elif type(value).__name__ in str(one.type).split(" | "):
            given[key] = value
        else:
            raise ValueError(f"{key} is not what it should be")
    return SocketOptions(**given)  # type: ignore[arg-type]  # checked just now


def have_other_members(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether two terms are the same as written, and look-ups have found other servers."""
    written = one.get("written")
    return written is not None and {**one, "upstreams": None} == {**other, "upstreams": None}
