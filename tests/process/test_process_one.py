"""As process 1 of a container: it reaps what others leave behind, and can still be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import procfs
from support.processes import state
from support.waiting import eventually

if TYPE_CHECKING:
    from process.conftest import Serve, Service

pytestmark = pytest.mark.process

_IS_ROOT: Final = os.geteuid() == 0
_OWN_USERS: Final = [] if _IS_ROOT else ["--user", "--map-root-user"]
IN_CONTAINER: Final = ["unshare", *_OWN_USERS, "--pid", "--fork", "--mount-proc", "--kill-child"]
ENTER: Final = ["nsenter", *([] if _IS_ROOT else ["--user", "--preserve-credentials"])]


def started(serve: Serve) -> tuple[Service, int]:
    """A forwarder with two workers, and its master, which is process 1 of a namespace."""
    service = serve(workers=2, prefix=IN_CONTAINER)
    (master,) = procfs.children(service.forwarder.pid)  # unshare has only this one
    status = Path(f"/proc/{master}/status").read_text()
    assert f"NSpid:\t{master}\t1\n" in status
    return service, master


def test_an_orphan_is_reaped_and_is_no_worker_that_died(serve: Serve) -> None:
    """Somebody executes a shell in the container that leaves a process behind.

    Steps: the shell ends, its child is the master's now; it ends, too.
    Result: no zombie is left, both workers are the same, clients are served.
    """
    service, master = started(serve)
    workers = procfs.children(master)
    assert len(workers) == 2
    with subprocess.Popen(
        [*ENTER, "--target", str(master), "--pid", "--mount", "sh", "-c", "exec 3<&0; cat <&3 &"],
        stdin=subprocess.PIPE,
    ) as shell:
        eventually(lambda: len(procfs.children(master)) == 3, "nothing was left behind")
        (orphan,) = set(procfs.children(master)) - set(workers)
        assert state(orphan) not in "ZX"
        assert shell.stdin is not None
        shell.stdin.close()  # all that the orphan waits for
        eventually(lambda: procfs.children(master) == workers, "a zombie is left")
    service.assert_serves()
    assert not service.forwarder.trouble()
    assert not any("died" in line for line in service.forwarder.lines)


def test_term_stops_it_with_success(serve: Serve) -> None:
    service, master = started(serve)
    os.kill(master, signal.SIGTERM)
    assert service.forwarder.wait() == 0  # unshare ends as its child does
    service.assert_nothing_left()
    assert not service.forwarder.trouble()


def test_an_upgrade_is_refused_because_a_container_ends_with_its_process_one(serve: Serve) -> None:
    service, master = started(serve)
    os.kill(master, signal.SIGUSR2)
    service.forwarder.wait_logged("not possible as process 1")
    service.assert_serves()
    os.kill(master, signal.SIGTERM)
    assert service.forwarder.wait() == 0
