"""A forwarder with a configuration file that a test rewrites while it runs."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING, Final

from support import procfs
from support.ends import written
from support.hosts import own_host
from support.leases import kept_from_readers
from support.processes import suspend
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.forwarder import Forwarder

# FORWARDER_SOAK=1 does everything as often as is promised, and takes minutes.
IS_SOAK: Final = os.environ.get("FORWARDER_SOAK") == "1"
_OUTCOME: Final = re.compile(r"master\.reloaded|generation \d+ stays in force")


def rule(listen: tuple[str, int], upstream: tuple[str, int], more: str = "") -> str:
    """A rule in TOML; ``more`` is added to its table."""
    return (
        f'[[forwarding_rules]]\nlisten = "{written(listen)}"\n'
        f'upstream = "{written(upstream)}"\n{more}\n'
    )


def many_rules(count: int = 3000) -> str:
    """Rules that take a while to read, on addresses that nobody else uses."""
    addresses = ((own_host(250), 12_000 + i) for i in range(count))
    return "".join(rule(address, ("127.0.0.1", 1)) for address in addresses)


class Configured:
    """A running forwarder and its configuration file."""

    def __init__(self, forwarder: Forwarder, path: Path) -> None:
        self.forwarder = forwarder
        self.path = path

    def outcomes(self) -> list[str]:
        """One line for each reload that has succeeded or failed so far."""
        return [line for line in self.forwarder.lines if _OUTCOME.search(line)]

    def reload(self, text: str) -> str:
        """Reload with this text, and wait for the outcome, which is returned."""
        self.path.write_text(text)
        return self.reload_as_it_is()

    def reload_as_it_is(self) -> str:
        """Reload whatever is in place of the file now."""
        return self.outcome_of(lambda: self.forwarder.signal(signal.SIGHUP))

    def outcome_of(self, cause: Callable[[], None]) -> str:
        """Do something that makes it reload, and wait for the outcome, which is returned."""
        before = len(self.outcomes())
        cause()
        eventually(
            lambda: len(self.outcomes()) > before, lambda: "\n".join(self.forwarder.lines[-20:])
        )
        return self.outcomes()[-1]

    def resize(self, number: signal.Signals, size: int) -> None:
        """Send SIGTTIN or SIGTTOU, and wait until ``size`` workers are ready."""
        pattern = f"master.ready .* workers={size} "
        before = sum(bool(re.search(pattern, line)) for line in self.forwarder.lines)
        self.forwarder.signal(number)
        eventually(
            lambda: sum(bool(re.search(pattern, line)) for line in self.forwarder.lines) > before,
            lambda: "\n".join(self.forwarder.lines[-20:]),
        )

    def begin_slow_reload(self, text: str) -> int:
        """Reload, and suspend the process that reads the file; returns its id."""
        workers = {*self.forwarder.workers()}
        self.path.write_text(text)
        with kept_from_readers(self.path):
            self.forwarder.signal(signal.SIGHUP)
            eventually(lambda: set(procfs.children(self.forwarder.pid)) > workers)
            (loader,) = set(procfs.children(self.forwarder.pid)) - workers
            # At first it still has all that the master has; it gives that up before it reads.
            eventually(lambda: not procfs.socket_count(loader), "it keeps sockets")
            suspend(loader)
        return loader
