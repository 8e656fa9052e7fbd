"""How a process has ended, in words."""

from __future__ import annotations

import pytest

from forwarder.system.signals import describe_end


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "exit status 0"),
        (70 << 8, "exit status 70"),
        (9, "killed by SIGKILL"),
        (40, "killed by signal 40"),
    ],
)
def test_every_end_can_be_told(status: int, said: str) -> None:
    """As waitpid(2) gives them on Linux; most signals for real time have no name in Python."""
    assert describe_end(status) == said
