"""Typed reading of one TOML table: values of the right kind or an issue with its place.

Knows kinds of values, not what the keys mean.
"""

from __future__ import annotations

from difflib import get_close_matches
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from forwarder.config.address import MAX_PORT, AddressError, parse_ports
from forwarder.config.durations import DURATION_FORMS, parse_duration
from forwarder.config.raw import Issues, Placed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forwarder.config.toml_places import Path, Places
    from forwarder.errors import Place

E = TypeVar("E", bound=Enum)

_FLAGS = ("true", "false")
# A user who mistyped a key wants that key, not all of them.
_MOST_NEAR = 2
_FEW_KEYS = 6


def describe(value: object) -> str:
    """Say what a value is, for "KEY is ..."."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {_short(repr(value))}"
    if isinstance(value, int | float):
        return f"the number {_short(_number(value))}"
    if isinstance(value, list):
        return "a list"
    return "a table" if isinstance(value, dict) else "a date or time"


def _number(value: float) -> str:
    try:
        return repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "with thousands of digits"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


class Table:
    """One table of the document. Unknown keys are reported when it is made."""

    def __init__(
        self,
        data: dict[str, object],
        path: Path,
        places: Places,
        issues: Issues,
        known: Sequence[str],
    ) -> None:
        self._data = data
        self._path = path
        self._places = places
        self.issues = issues
        for key in data:
            if key not in known:
                self._report_unknown(key, known)

    def _report_unknown(self, key: str, known: Sequence[str]) -> None:
        near = get_close_matches(key.lower(), known, _MOST_NEAR)
        is_short = len(known) <= _FEW_KEYS
        allowed = ", ".join(known) if is_short and not near else ""
        hint = "" if allowed else "forwarder.toml(5) has all keys"
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        self.issues.error(
            self.place(key), f"unknown key {_short(repr(key))}", allowed=allowed, hint=hint
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def place(self, *keys: str | int) -> Place:
        """Return the place of a key in this table, or of the table itself."""
        return self._places.at((*self._path, *keys))

    def get(self, key: str) -> object:
        """Return a value as tomllib read it, None where there is none."""
        return self._data.get(key)

    def bad(self, key: str, allowed: str, hint: str = "") -> None:
        """Report a value as one that is not allowed."""
        what = f"{key} is {describe(self._data[key])}"
        self.issues.error(self.place(key), what, allowed=allowed, hint=hint)

    def text(self, key: str, allowed: str = "a text in quotes") -> Placed[str] | None:
        """Read a text: not empty, without control characters."""
        value = self._data.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.bad(key, allowed)
        elif not value:
            self.issues.error(self.place(key), f"{key} is empty", allowed=allowed)
        elif not value.isprintable():
            self.bad(key, f"{allowed}, without control characters")
        else:
            return Placed(value, self.place(key))
        return None

    def ports(self, key: str) -> Placed[tuple[int, int]] | None:
        """Read a port number, or a range of them as a text: the first, and how many."""
        value = self._data.get(key)
        if value is None:
            return None
        place = self.place(key)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PORT:
            return Placed((value, 1), place)
        allowed = f'a number from 1 to {MAX_PORT}, or a range such as "8000-8999"'
        if isinstance(value, str) and "-" in value:
            try:
                return Placed(parse_ports(value), place)
            except AddressError as error:
                self.issues.error(place, f"{key}: {error}", allowed=allowed)
            return None
        hint = "write the number without quotes" if isinstance(value, str) else ""
        self.bad(key, allowed, hint)
        return None

    def number(self, key: str, least: int, most: int) -> Placed[int] | None:
        """Read a whole number within bounds."""
        value = self._data.get(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return Placed(value, self.place(key))
        hint = "write the number without quotes" if isinstance(value, str) else ""
        self.bad(key, f"a whole number from {least} to {most}", hint)
        return None

    def flag(self, key: str) -> Placed[bool] | None:
        """Read true or false."""
        value = self._data.get(key)
        if value is None:
            return None
        if isinstance(value, bool):
            return Placed(value, self.place(key))
        self.bad(key, "true or false", "write it without quotes" if value in _FLAGS else "")
        return None

    def duration(self, key: str) -> Placed[float] | None:
        """Read a duration in seconds."""
        value = self._data.get(key)
        if value is None:
            return None
        try:
            return Placed(parse_duration(value), self.place(key))
        except ValueError as error:
            self.issues.error(
                self.place(key),
                f"{key}: {describe(value)} {error}",
                allowed=DURATION_FORMS,
            )
        return None

    def choice(self, key: str, choices: type[E]) -> Placed[E] | None:
        """Read one of the values of an enumeration."""
        value = self._data.get(key)
        if value is None:
            return None
        names = [str(choice.value) for choice in choices]
        if isinstance(value, str):
            if value in names:
                return Placed(choices(value), self.place(key))
            near = get_close_matches(value.lower(), names, 1)
        else:
            near = []
        self.bad(
            key,
            ", ".join(f'"{name}"' for name in names),
            f'did you mean "{near[0]}"?' if near else "",
        )
        return None

    def table(self, key: str, known: Sequence[str], allowed: str = "a table") -> Table | None:
        """Read the one table of a key."""
        value = self._data.get(key)
        if isinstance(value, dict):
            return Table(value, (*self._path, key), self._places, self.issues, known)
        if value is not None:
            is_array = isinstance(value, list) and all(isinstance(item, dict) for item in value)
            self.bad(key, allowed, "write it with single brackets" if is_array and value else "")
        return None

    def item(self, key: str, index: int, known: Sequence[str]) -> Table | None:
        """Read a table that is an element of a list; None for anything else."""
        value = self._data.get(key)
        item = value[index] if isinstance(value, list) else None
        if not isinstance(item, dict):
            return None
        return Table(item, (*self._path, key, index), self._places, self.issues, known)

    def tables(self, key: str, known: Sequence[str]) -> Iterator[Table]:
        """Read an array of tables, one by one."""
        value = self._data.get(key)
        if value is None:
            return
        if not isinstance(value, list):
            name = ".".join([*(str(part) for part in self._path if isinstance(part, str)), key])
            hint = f"write [[{name}]] with double brackets" if isinstance(value, dict) else ""
            self.bad(key, "an array of tables", hint)
            return
        for index, item in enumerate(value):
            if isinstance(item, dict):
                path = (*self._path, key, index)
                yield Table(item, path, self._places, self.issues, known)
            else:
                self.issues.error(
                    self.place(key, index),
                    f"element {index + 1} of {key} is {describe(item)}",
                    allowed="a table",
                )
