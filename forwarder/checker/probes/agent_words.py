"""The line that an agent says of its server, in the words that HAProxy made up. Pure.

HAProxy's configuration manual, ``agent-check``: words with blanks, tabs or commas between them, in
any order. ``75%`` is a part of the configured weight; ``maxconn:30`` bounds sessions; ``ready``,
``drain`` and ``maint`` are what an operator would order; ``up``, ``down``, ``fail`` and ``stopped``
say how the server is, the last three with a reason behind a ``#`` if they like. What is not said
stays as it was. Beyond that, ``failed`` is ``fail``, and ``weight:20`` a weight by itself.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from forwarder.checker.outcome import Advice, Word
from forwarder.checker.probes.why import quoted

_SEPARATORS: Final = re.compile(rb"[ \t,]+")
_PERCENT: Final = re.compile(rb"([0-9]{1,9})%")
_NUMBER: Final = re.compile(rb"(maxconn|weight):([0-9]{1,9})(%?)", re.IGNORECASE)
_MOST_PERCENT: Final = 100
_MOST_WEIGHT: Final = 256  # as in the configuration
_ORDERS: Final = {word.value.encode(): word for word in Word}
_IS_UP: Final = {b"up": True, b"down": False, b"fail": False, b"failed": False, b"stopped": False}


class Said(NamedTuple):
    """What an agent has said. ``why``: how it is, if that is not well."""

    advice: Advice
    why: str = ""


def parse_words(line: bytes) -> Said | None:
    """Read a line, without its end; None if no word of it means anything. The last word counts."""
    words, _, reason = line.partition(b"#")
    found = {}
    why = ""
    for word in _SEPARATORS.split(words):
        part = _parse(word.lower())
        found.update(part)
        if part.get("is_up") is False:
            why = f"agent: {word.lower().decode()}"
    if not found:
        return None
    if why and reason.strip():
        why += f" {quoted(reason.strip())}"
    advice = Advice(**found)  # type: ignore[arg-type]  # as each is read
    return Said(advice, why if advice.is_up is False else "")


def _parse(word: bytes) -> dict[str, object]:
    """What one word, in small letters, sets of an advice; nothing if it means nothing."""
    if word in _ORDERS:
        return {"word": _ORDERS[word]}
    if word in _IS_UP:
        return {"is_up": _IS_UP[word]}
    percent = _PERCENT.fullmatch(word)
    if percent:
        return {"percent": min(int(percent[1]), _MOST_PERCENT)}
    number = _NUMBER.fullmatch(word)
    if number is None:
        return {}
    value = int(number[2])
    if number[1] == b"maxconn":
        return {} if number[3] else {"max_sessions": value}
    if number[3]:
        return {"percent": min(value, _MOST_PERCENT)}
    return {"weight": min(value, _MOST_WEIGHT)}
