"""Host names that mean what a test says, in each forwarder that it starts: see ``fakenames``."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pytest

PROGRAMS: Final = Path(__file__).with_name("fakenames")


class FakeNames:
    """Names and their servers. A name that was never given anything means nothing."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        """``patch`` puts the environment back."""
        self._directory = directory
        directory.mkdir(mode=0o755)
        (directory / ".asked").touch()
        (directory / ".asked").chmod(0o666)  # workers may run as somebody else
        self._write(".server", "")
        path = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", f"{PROGRAMS}:{path}" if path else str(PROGRAMS))
        patch.setenv("FORWARDER_TEST_NAMES", str(directory))

    def give(self, host: str, *addresses: str) -> None:
        """The name has these addresses from now on."""
        self._write(host, " ".join(addresses))

    def forget(self, host: str) -> None:
        """The name means nothing from now on."""
        (self._directory / host).unlink(missing_ok=True)

    def silence(self, *hosts: str) -> None:
        """Nobody answers who asks for these names."""
        for host in hosts:
            self._write(host, "silent")

    def stop_server(self, how: str = "silent") -> None:
        """No name can be looked up: nobody answers, or ("refused") it is said at once."""
        self._write(".server", how)

    def start_server(self) -> None:
        """Names can be looked up again."""
        self._write(".server", "")

    def asked(self) -> Counter[str]:
        """How often each name was looked up."""
        return Counter((self._directory / ".asked").read_text().split())

    def _write(self, name: str, text: str) -> None:
        """Replace a file in one step: it may be read just now."""
        path = self._directory / f".new-{name}"
        path.write_text(text)
        path.replace(self._directory / name)
