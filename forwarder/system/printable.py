"""Foreign text, made safe for a log line and for a terminal. Pure."""

from __future__ import annotations


def visible(text: str, *, kept: str = "") -> str:
    """``text``, with escapes in place of what a terminal would obey or not show.

    So a name cannot write a second line or move the cursor. ``kept``: characters that stay as they
    are.
    """
    if text.isprintable():
        return text
    # Not by the codec unicode_escape: it is a module, which a user without rights may not read.
    return "".join(
        char if char.isprintable() or char in kept else ascii(char)[1:-1] for char in text
    )


def field(text: str) -> str:
    """``text`` as the value of ``key=value`` in a line of the log: in quotes if it has a space.

    Names of rules may have any character, and by default are of two words.
    """
    if text and not any(char in text for char in ' "='):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
