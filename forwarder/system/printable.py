"""Text of others, made fit for a line of a log and for a terminal. Pure."""

from __future__ import annotations


def visible(text: str, *, kept: str = "") -> str:
    """``text``, with escapes in place of what a terminal would obey or not show.

    So nobody can write a second line, or move the cursor, with what was a name. ``kept``:
    characters that stay all the same.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode()
        for char in text
    )
