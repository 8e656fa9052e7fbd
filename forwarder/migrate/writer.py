"""A draft as TOML that our own loader reads, with the comments where they belong. Pure.

Theory of operation. The text is a list of pieces in the order of the format: settings, global
access rules, forwarding rules. A piece knows which lines of the source it comes from. A comment
goes with the piece on its line or, where there is none, with the next one of the source, wherever
that stands.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from forwarder.config.keys import OF_A_RULE, OF_A_SERVER
from forwarder.config.model import LogFormat, Protocol
from forwarder.migrate.draft import LEFT_OUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forwarder.config.model import AccessRule, Upstream
    from forwarder.config.raw import RawRule, Value
    from forwarder.errors import Place
    from forwarder.migrate.draft import Draft, Remark


@dataclass(slots=True)
class _Piece:
    """Lines of the result; ``start`` and ``end`` are positions in the source, 0 is nowhere."""

    lines: list[str]
    start: int = 0
    end: int = 0
    indent: str = ""
    remarks: list[Remark] = field(default_factory=list)


def write(draft: Draft) -> str:
    """Write a draft. Values that no file can hold are found when it is loaded."""
    pieces = [*_settings(draft), *_access(draft, draft.raw.access, "global_rules")]
    before_rules = len(pieces)
    for rule in draft.raw.rules:
        pieces += _rule(draft, rule)
    left = _assign(draft, pieces)
    lines: list[str] = []
    for index, piece in enumerate(pieces):
        is_setting = index < before_rules and not piece.indent
        if is_setting and piece.remarks and lines and lines[-1]:
            lines.append("")
        lines += _lines_of(piece)
    lines += ["", *_comments(left)]
    return "\n".join(lines).strip("\n") + "\n"


def _settings(draft: Draft) -> list[_Piece]:
    raw = draft.raw
    found = [(gap.place, [gap.text]) for gap in draft.gaps]
    if raw.settings.pid_file:
        line = f"pid_file = {text(raw.settings.pid_file)}"
        found.append((draft.settings["pid_file"], [line]))
    for log in raw.settings.logs:
        found.append((log.place, [f"log_file = {text(log.to)}"]))
        if log.format is not LogFormat.RINETD:
            line = f"log_format = {text(log.format.value)}"
            found.append((draft.settings["log_format"], [line]))
    found += [
        (placed.place, [f"{key} = {_value(OF_A_RULE[key].shown(placed.value))}"])
        for key, placed in raw.defaults.items()
    ]
    pieces = [_piece(draft, lines, place) for place, lines in found]
    return sorted(pieces, key=lambda piece: piece.start)


def _piece(draft: Draft, lines: list[str], place: Place, indent: str = "") -> _Piece:
    start = draft.position(place)
    return _Piece(lines, start, draft.ends.get(start, start), indent)


def _access(draft: Draft, rules: Sequence[AccessRule], key: str) -> list[_Piece]:
    if not rules:
        return []
    lines = [
        f"  {{ type = {text(rule.verdict.value)}, pattern = {text(rule.pattern)} }},"
        for rule in rules
    ]
    # A comment before the first one is about all of them.
    pieces = [_piece(draft, [f"{key} = [", lines[0]], rules[0].place)]
    for rule, line in zip(rules[1:], lines[1:], strict=True):
        pieces.append(_piece(draft, [line], rule.place, "  "))
    return [*pieces, _Piece(["]"])]


def _rule(draft: Draft, rule: RawRule) -> list[_Piece]:
    lines = ["[[forwarding_rules]]", *(f"{key} = {value}" for key, value in _keys(rule))]
    gap = _Piece([""])
    return [gap, _piece(draft, lines, rule.place), *_access(draft, rule.access, "rules")]


def _keys(rule: RawRule) -> Iterator[tuple[str, str]]:
    if rule.name:
        yield "name", text(rule.name.value)
    yield "listen", text(str(rule.listen.value))
    upstreams = [_server(upstream.value) for upstream in rule.upstreams]
    yield "upstream", upstreams[0] if len(upstreams) == 1 else f"[{', '.join(upstreams)}]"
    if rule.protocol is not Protocol.TCP:
        yield "protocol", text(rule.protocol.value)
    for key in OF_A_RULE.values():
        if placed := rule.keys.get(key.name):
            yield key.name, _value(key.shown(placed.value))


def _server(upstream: Upstream) -> str:
    """An upstream as its address, or as a table with what it has besides."""
    values = {name: getattr(upstream, key.field) for name, key in OF_A_SERVER.items()}
    said = [
        f"{name} = {_value(value)}"
        for name, value in values.items()
        if value != OF_A_SERVER[name].default
    ]
    at = text(str(upstream))
    return f"{{ at = {at}, {', '.join(said)} }}" if said else at


def text(value: str) -> str:
    """A TOML string: escaped as in JSON, and DEL as well."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(int(value)) if value == int(value) else repr(value)
    return text(str(value.value if isinstance(value, Enum) else value))


# -- comments


def _assign(draft: Draft, pieces: list[_Piece]) -> list[Remark]:
    """Give each comment to a piece. Returns those behind the last one."""
    placed = sorted((piece for piece in pieces if piece.start), key=lambda piece: piece.start)
    starts = [piece.start for piece in placed]
    # For each piece the latest so far that takes several lines and may go on behind it.
    outer, outers = None, []
    for piece in placed:
        outer = piece if piece.end > piece.start else outer
        outers.append(outer)
    left = []
    for remark in sorted(draft.remarks, key=lambda remark: draft.position(remark.place)):
        at = draft.position(remark.place)
        index = bisect_right(starts, at)
        around = (placed[index - 1], outers[index - 1]) if index else ()
        inside = next((piece for piece in around if piece and at <= piece.end), None)
        if inside:
            inside.remarks.append(remark)
        elif index < len(placed):
            placed[index].remarks.append(remark)
        else:
            left.append(remark)
    return left


def _lines_of(piece: _Piece) -> list[str]:
    return [f"{piece.indent}{line}" if line else "" for line in _comments(piece.remarks)] + (
        piece.lines
    )


def _comments(remarks: Sequence[Remark]) -> list[str]:
    """Comments as TOML allows them; with a blank line where there was something between them."""
    lines: list[str] = []
    last: Remark | None = None
    for remark in remarks:
        if last is not None and _is_apart(last, remark):
            lines.append("")
        lines.append("".join(c if c == "\t" or c.isprintable() else "?" for c in remark.text))
        last = remark
    return lines


def _is_apart(last: Remark, remark: Remark) -> bool:
    """Whether something stood between two comments, neither of them a left-out statement."""
    is_gap = LEFT_OUT in (last.text[: len(LEFT_OUT)], remark.text[: len(LEFT_OUT)])
    return not is_gap and remark.place.line > last.place.line + 1
