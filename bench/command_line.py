"""What the command lines of the measurements have in common. Measures nothing."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    from types import FrameType


def positive(text: str) -> int:
    """Parse a count of at least one."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def add_forwarder(parser: argparse.ArgumentParser) -> None:
    """Add ``--forwarder``: the command that starts it, as a list of words."""
    parser.add_argument(
        "--forwarder",
        type=command,
        default=os.environ.get("FORWARDER", "forwarder"),
        metavar="CMD",
        help="the command that starts the forwarder (default: $FORWARDER, else forwarder)",
    )


def command(text: str) -> list[str]:
    """Split a command as a shell would; at least one word."""
    words = shlex.split(text)
    if not words:
        raise ValueError(text)
    return words


def exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave by an exception, so that every child is ended on the way out."""
    sys.exit(128 + number)
