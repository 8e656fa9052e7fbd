"""What the command lines of the measurements have in common. Measures nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType


def positive(text: str) -> int:
    """Parse a count of at least one."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave by an exception, so that every child is ended on the way out."""
    sys.exit(128 + number)
