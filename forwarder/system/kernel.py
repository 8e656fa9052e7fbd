"""Which kernel runs here and how it is set: its version, settings of sysctl(8). Changes nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_SETTINGS: Final = Path("/proc/sys")


def is_linux(least: tuple[int, int]) -> bool:
    """Whether this kernel is Linux, of version ``least`` or newer."""
    name = os.uname()
    numbers = re.match(r"([0-9]+)\.([0-9]+)", name.release)
    if name.sysname != "Linux" or numbers is None:
        return False
    return (int(numbers[1]), int(numbers[2])) >= least


def setting(name: str) -> str:
    """A setting, by its path below /proc/sys, such as ``net/core/somaxconn``.

    Network settings are those of this network namespace. Empty where there is none.
    """
    try:
        return (_SETTINGS / name).read_text().strip()
    except OSError:
        return ""
