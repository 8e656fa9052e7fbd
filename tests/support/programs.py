"""Programs that a test may need."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Test = TypeVar("Test", bound=Callable[..., None])


def debian(*programs: str) -> Callable[[Test], Test]:
    """Mark a test that needs programs of Debian packages; it is skipped where one is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    skip = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")

    def mark(test: Test) -> Test:
        marked: Test = pytest.mark.debian(skip(test))
        return marked

    return mark
