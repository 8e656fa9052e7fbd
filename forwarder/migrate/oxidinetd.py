"""oxidinetd's TOML, which is already ours except for keys that oxidinetd ignores and we do not.

So the text stays as it is, comments and all, with those keys made comments.
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Final

from forwarder.config import toml_conf
from forwarder.config.toml_places import Places
from forwarder.errors import Place
from forwarder.migrate.draft import LEFT_OUT, Draft

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.config.toml_places import Path

_TOP: Final = frozenset({"forwarding_rules", "global_rules", "log_file", "log_format", "pid_file"})
_RULE: Final = frozenset(
    {
        "bind_address",
        "bind_port",
        "connect_address",
        "connect_port",
        "protocol",
        "rules",
        "source_address",
        "timeout",
    }
)
# No rule in our own format is complete without one of these.
_OURS: Final = frozenset({"listen", "upstream"})
_ACCESS: Final = frozenset({"pattern", "type"})
_HEADER: Final = re.compile(r"[ \t]*\[")
_UNUSED: Final = {
    "global_rules": "these access rules are applied; oxidinetd reads and forgets them",
    "log_file": "the connection log is written; oxidinetd reads the key and writes none",
    "pid_file": "the pid file is written; oxidinetd reads the key and writes none",
    "rules": "these access rules are applied; oxidinetd reads and forgets them",
    "source_address": "the source address is used; oxidinetd reads the key and leaves the choice"
    " to the kernel",
}


def read(text: str, source: str) -> tuple[str, Draft]:
    """Return the text in our format, and what it means. Problems are in the draft."""
    draft = Draft()
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError):
        draft.raw = toml_conf.parse(text, source, draft.issues)  # which reports what is wrong
        return text, draft
    places = Places(text, source)
    for index, rule in _tables(data, "forwarding_rules"):
        for key in _OURS & rule.keys():
            place = places.at(("forwarding_rules", index, key))
            what = f"{key} is a word of the forwarder's own format, which needs no conversion"
            draft.issues.error(place, what)
            draft.raw.rules_seen = 1
    if draft.raw.rules_seen:
        return text, draft
    lines = text.split("\n")
    is_done = True
    for path in list(_unknown(data)):
        place = places.at(path)
        name = ".".join(str(part) for part in path if isinstance(part, str))
        if _comment_out(lines, place.line, path):
            draft.leave_out(place, name, "oxidinetd ignores it", in_rule=True)
        else:
            is_done = False
            hint = "take it out by hand; oxidinetd ignores it"
            draft.issues.error(place, f"{name} is no key of oxidinetd", hint=hint)
    result = "\n".join(lines)
    if not is_done:
        draft.raw.rules_seen = 1
        return result, draft
    if not _is_same(result, data):
        draft.issues.error(
            Place(source),
            "the keys that oxidinetd ignores cannot be separated from the others",
            hint="take them out by hand: forwarder check --format toml names them",
        )
    draft.raw = toml_conf.parse(result, source, draft.issues)
    for path in _used(data):
        draft.differ(places.at(path), _UNUSED[str(path[-1])])
    return result, draft


def _is_same(result: str, data: dict[str, object]) -> bool:
    """Whether the text has exactly the known keys of ``data``, which is cut down to them."""
    for *way, key in list(_unknown(data)):
        table: object = data
        for step in way:
            table = table[step]  # type: ignore[index]  # the steps are those of the document
        del table[key]  # type: ignore[attr-defined]  # a table, as it has a key
    try:
        return tomllib.loads(result) == data
    except ValueError:
        return False


def _tables(data: dict[str, object], key: str) -> Iterator[tuple[int, dict[str, object]]]:
    found = data.get(key)
    for index, table in enumerate(found if isinstance(found, list) else ()):
        if isinstance(table, dict):
            yield index, table


def _unknown(data: dict[str, object]) -> Iterator[Path]:
    """Paths of the keys that oxidinetd does not know."""
    yield from ((key,) for key in data if key not in _TOP)
    yield from _unknown_access(data, "global_rules", ())
    for index, rule in _tables(data, "forwarding_rules"):
        path = ("forwarding_rules", index)
        yield from ((*path, key) for key in rule if key not in _RULE)
        yield from _unknown_access(rule, "rules", path)


def _unknown_access(data: dict[str, object], key: str, path: Path) -> Iterator[Path]:
    for index, entry in _tables(data, key):
        yield from ((*path, key, index, name) for name in entry if name not in _ACCESS)


def _used(data: dict[str, object]) -> Iterator[Path]:
    """Paths of keys that have an effect here and none in oxidinetd."""
    yield from ((key,) for key in data if key in _UNUSED and data[key])
    for index, rule in _tables(data, "forwarding_rules"):
        path = ("forwarding_rules", index)
        yield from ((*path, key) for key in rule if key in _UNUSED and rule[key])


def _comment_out(lines: list[str], line: int, path: Path) -> bool:
    """Comment out the lines of a key. False if it shares its first line with another."""
    first = line - 1
    if first < 0 or lines[first].startswith("#"):
        return lines[first].startswith("#") if first >= 0 else False
    if _HEADER.match(lines[first]):
        return len(path) == 1 and _comment_out_table(lines, str(path[0]))
    for last in range(first, len(lines)):
        try:
            found = tomllib.loads("\n".join(lines[first : last + 1]))
        except ValueError:
            continue
        if list(found) != [path[-1]]:
            return False
        _mark(lines, first, last)
        return True
    return False


def _comment_out_table(lines: list[str], name: str) -> bool:
    """Comment out all tables of a name, with the tables in them."""
    header = re.compile(rf"[ \t]*\[\[?[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*[].]")
    is_inside = False
    for number, line in enumerate(lines):
        if _HEADER.match(line):
            is_inside = header.match(line) is not None
        if is_inside and line.strip():
            _mark(lines, number, number)
    return True


def _mark(lines: list[str], first: int, last: int) -> None:
    for number in range(first, last + 1):
        if lines[number].strip():
            lines[number] = LEFT_OUT + lines[number]
