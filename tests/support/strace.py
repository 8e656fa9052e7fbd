"""System calls of running processes made to fail, by strace(1) and ptrace(2)."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterable


class Injection:
    """While it is entered, ``calls`` of these processes end with ``error`` and do nothing.

    ``when`` is strace's: ``3`` only the third call, ``3+`` that and all that follow, ``3+5`` that
    and every fifth after it; each process counts by itself. Needs a tracer's rights: as root it has
    them.
    """

    def __init__(
        self,
        pids: Iterable[int],
        calls: str,
        error: str,
        when: str,
        trace: Path,
        *,
        follows: bool = False,
    ) -> None:
        """``trace`` is a file for what was called; ``follows``: children and new threads, too."""
        self._pids = list(pids)
        self._trace = trace
        self._command = [
            *("strace", "-o", str(trace), "-e", f"trace={calls}"),
            *("-e", f"inject={calls}:error={error}:when={when}"),
            *(["-f"] if follows else []),
            *(word for pid in self._pids for word in ("-p", str(pid))),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def count(self) -> int:
        """How many calls have failed for it so far."""
        text = self._trace.read_text(errors="replace") if self._trace.exists() else ""
        return text.count("(INJECTED)")

    def start(self) -> None:
        """Begin; every process is being traced afterwards."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: all(map(_is_traced, self._pids)), f"not traced: {self._pids}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Leave the processes alone again."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _is_traced(pid: int) -> bool:
    """Whether every thread of a process has a tracer; true if it has ended."""
    try:
        tasks = [*Path(f"/proc/{pid}/task").iterdir()]
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)
    except OSError:
        return True
