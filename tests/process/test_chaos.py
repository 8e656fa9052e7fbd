"""A short chaos run; ``make chaos`` is longer, and other acts each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the namespaces of a run"),
]
SEED = 5845  # in 7 s: kills of workers, the master and an upstream, a hang, moves, an upgrade


def test_nobody_loses_what_need_not_be_lost() -> None:
    command = [sys.executable, "-m", "chaos", "--seed", str(SEED), "--minutes", "0.12"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
