"""What tests of a relay in this process have in common."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from support.by_hand import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A relay that the test turns by hand; at the end nothing may be left of it."""
    with closing(Bench()) as bench:
        yield bench


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what the test opens, before the relay is closed if it was asked for after that."""
    with ExitStack() as stack:
        yield stack
