"""Where each key of a TOML document stands, which tomllib does not report.

Walks a text that tomllib has accepted, once, and notes the offset of every table header, key and
array element. Checks nothing and reads no values; where it loses its way it stops, and what comes
after has the place of its nearest known parent.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from contextlib import suppress

from forwarder.errors import Place

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BLANK_STARTS = frozenset(" \t\r\n#")
_KEY = re.compile(r"""[ \t]*(?:([A-Za-z0-9_-]+)|("(?:[^"\\\n]|\\.)*"|'[^'\n]*'))[ \t]*""")
_SCALAR = re.compile(
    r'''"""(?:[^\\]|\\[\s\S])*?""""{0,2}'''
    r"""|'''[\s\S]*?''''{0,2}"""
    r"""|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^,\]}\n#"']+"""
)
# Most lines of a long file; the general way takes several times as long.
_SIMPLE_LINE = re.compile(
    r"""[ \t]*([A-Za-z0-9_-]+)[ \t]*=[ \t]*"""
    r"""(?:"[^"\\\n]*"|[^"'\[{#\n \t][^"'\n#]*)[ \t\r]*(?:#[^\n]*)?\n"""
)


class _LostError(Exception):
    """The text is not what the walk expected."""


class Places:
    """Places of the keys of one document."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._text = text
        self._offsets: dict[Path, int] = {}
        self._table_counts: dict[Path, int] = {}
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        with suppress(_LostError, RecursionError):
            self._walk()

    def at(self, path: Path) -> Place:
        """Return the place of a key or element, or of its nearest known parent."""
        while path and path not in self._offsets:
            path = path[:-1]
        if not path:
            return Place(self._source)
        return self._place_of(self._offsets[path])

    def _place_of(self, offset: int) -> Place:
        line = bisect_right(self._line_starts, offset)
        return Place(self._source, line, offset - self._line_starts[line - 1] + 1)

    def _walk(self) -> None:
        text, offsets = self._text, self._offsets
        table: Path = ()
        at = 0
        while True:
            at = self._blank(at)
            if at >= len(text):
                return
            simple = _SIMPLE_LINE.match(text, at)
            if simple:
                offsets.setdefault((*table, simple[1]), simple.start(1))
                at = simple.end()
            elif text[at] == "[":
                table, at = self._header(at)
            else:
                at = self._assignment(at, table)

    def _blank(self, at: int) -> int:
        if self._text[at : at + 1] not in _BLANK_STARTS:
            return at
        match = _BLANK.match(self._text, at)
        return match.end() if match else at

    def _header(self, start: int) -> tuple[Path, int]:
        """Read ``[a.b]`` or ``[[a.b]]``; return the path of the table and where it ends."""
        is_array = self._text.startswith("[[", start)
        names, at = self._key(start + 1 + is_array)
        path: Path = ()
        for name in names[:-1]:
            self._offsets.setdefault((*path, name), start)
            path = self._enter((*path, name))
        path = (*path, names[-1])
        self._offsets.setdefault(path, start)
        if is_array:
            count = self._table_counts.get(path, 0)
            self._table_counts[path] = count + 1
            path = (*path, count)
            self._offsets[path] = start
        else:
            path = self._enter(path)
        return path, at + 1 + is_array

    def _enter(self, path: Path) -> Path:
        """Step into a table; of an array of tables that is the latest one."""
        count = self._table_counts.get(path)
        return path if count is None else (*path, count - 1)

    def _key(self, at: int) -> tuple[list[str], int]:
        """Read a dotted key; return its parts and the offset behind it."""
        names = []
        while True:
            match = _KEY.match(self._text, at)
            if match is None:
                raise _LostError
            names.append(match[1] or _unquote(match[2]))
            at = match.end()
            if not self._text.startswith(".", at):
                return names, at
            at += 1

    def _assignment(self, start: int, table: Path) -> int:
        """Read ``a.b = value``; return the offset behind the value."""
        names, at = self._key(start)
        if not self._text.startswith("=", at):
            raise _LostError
        path = table
        for name in names:
            path = (*path, name)
            self._offsets.setdefault(path, start)
        at += 1
        while self._text[at : at + 1] in {" ", "\t"}:
            at += 1
        return self._value(at, path)

    def _value(self, at: int, path: Path) -> int:
        if self._text.startswith("[", at):
            return self._items(at + 1, path, "]")
        if self._text.startswith("{", at):
            return self._items(at + 1, path, "}")
        match = _SCALAR.match(self._text, at)
        if match is None:
            raise _LostError
        return match.end()

    def _items(self, at: int, path: Path, closing: str) -> int:
        """Read the elements of an array or the pairs of an inline table, to the closing sign."""
        index = 0
        while True:
            at = self._blank(at)
            if self._text.startswith(closing, at):
                return at + 1
            if closing == "]":
                self._offsets[(*path, index)] = at
                at = self._value(at, (*path, index))
                index += 1
            else:
                at = self._assignment(at, path)
            at = self._blank(at)
            if self._text.startswith(",", at):
                at += 1
            elif not self._text.startswith(closing, at):
                raise _LostError


def _unquote(key: str) -> str:
    if "\\" not in key:
        return key[1:-1]
    return next(iter(tomllib.loads(f"{key} = 0")))
