"""Programs that a test may need."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from support.processes import listeners
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
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


@contextmanager
def rinetd(path: Path, addresses: Iterable[tuple[str, int]]) -> Iterator[None]:
    """Run it with a configuration, once it listens at these addresses."""
    with subprocess.Popen(["rinetd", "-f", "-c", str(path)], stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: all(listeners(address) for address in addresses))
            yield
        finally:
            process.kill()
