"""The load of `storm.c` as a process, and what has become of its clients.

Starts and ends nothing else.
"""

from __future__ import annotations

import subprocess
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

from bench.procs import BenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

END_S = 60.0  # a connection is given up after 15 s, see storm.c


@dataclass(frozen=True, slots=True)
class Counts:
    """Clients by what became of them; a stream that was ended is in the second six.

    ``slowest_ms`` is of the connections that were served since the last look.
    """

    served: int = 0
    refused: int = 0
    reset: int = 0
    cut: int = 0
    wrong: int = 0
    late: int = 0
    streams_served: int = 0
    streams_refused: int = 0
    streams_reset: int = 0
    streams_cut: int = 0
    streams_wrong: int = 0
    streams_late: int = 0
    stream_bytes: int = 0
    slowest_ms: int = 0

    def __sub__(self, other: Counts) -> Counts:
        """What has come since ``other``."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        differences = [mine - theirs for mine, theirs in pairs]
        return replace(Counts(*differences), slowest_ms=self.slowest_ms)

    @property
    def lost(self) -> int:
        """Whose connection was ended early: what a killed process does to its sessions."""
        return self.reset + self.cut + self.streams_reset + self.streams_cut

    @property
    def never(self) -> int:
        """What nothing excuses: refused, other bytes than were sent, no end in 15 s."""
        refused = self.refused + self.streams_refused
        return refused + self.wrong + self.streams_wrong + self.late + self.streams_late


class Storm:
    """Connections at a steady rate, and streams, until told to end. Owns the process."""

    def __init__(self, command: Sequence[str], *, rate: int, streams: int) -> None:
        """``command`` is the program with host and port."""
        self.last = Counts()
        self._process = subprocess.Popen(
            [*command, str(rate), "0", str(streams)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def counts(self) -> Counts:
        """What has become of the clients so far. Raises BenchError when the load has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("?")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> Counts:
        """Start no more, let those end that are under way; what has become of all."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._read()

    def close(self) -> None:
        """End it without mercy, if it has not ended."""
        self._process.kill()
        self._process.wait(END_S)
        for file in (self._process.stdin, self._process.stdout):
            if file is not None:
                file.close()

    def _read(self) -> Counts:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("the load has ended")
        self.last = Counts(*map(int, line.split()))
        return self.last
