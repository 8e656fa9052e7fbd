"""Where commands find an instance whose user has no runtime directory, as in cron jobs and su."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.control import ask
from support.processes import run_command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from process.conftest import Launch, Serve

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else"),
]


class Somebody:
    """A user of whom there is nothing yet, and the directory that the control socket gets."""

    def __init__(self) -> None:
        # One for each test process: all of them share /tmp.
        self.uid = 10_000 + os.getpid() % 50_000
        while self.directory.exists():
            self.uid += 50_000
        self._user = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]

    @property
    def directory(self) -> Path:
        return Path(f"/tmp/forwarder-{self.uid}")

    def session(self, *variables: str) -> list[str]:
        """A prefix that runs a command as this user, with these variables and no other place."""
        places = ("-u", "RUNTIME_DIRECTORY", "-u", "XDG_RUNTIME_DIR")
        return ["env", *places, *variables, *self._user]


@pytest.fixture
def somebody() -> Iterator[Somebody]:
    """See :class:`Somebody`."""
    found = Somebody()
    yield found
    if found.directory.is_symlink():
        found.directory.unlink()
    shutil.rmtree(found.directory, ignore_errors=True)


def pid_by_status(prefix: Sequence[str]) -> int:
    """Of the instance that ``forwarder status`` finds."""
    done = run_command("status", "--json", prefix=prefix)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["pid"])


def test_without_a_runtime_directory_it_is_found_all_the_same(
    serve: Serve, somebody: Somebody
) -> None:
    it = serve(prefix=somebody.session())
    status = somebody.directory.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (somebody.uid, 0o700)
    assert pid_by_status(somebody.session()) == it.forwarder.pid
    assert run_command("stop", prefix=somebody.session()).stdout == "stopped\n"
    assert it.forwarder.wait() == 0
    assert list(somebody.directory.iterdir()) == []


def test_the_runtime_directory_of_somebody_else_is_not_used(
    serve: Serve, somebody: Somebody, public_path: Path
) -> None:
    """su(1) without ``-`` leaves the variable of whoever called it."""
    of_root = somebody.session(f"XDG_RUNTIME_DIR={public_path}")
    it = serve(prefix=of_root)
    assert list(public_path.iterdir()) == []
    for prefix in (of_root, somebody.session()):
        assert pid_by_status(prefix) == it.forwarder.pid


def test_it_is_found_from_a_session_that_has_a_runtime_directory(
    serve: Serve, somebody: Somebody, public_path: Path
) -> None:
    it = serve(prefix=somebody.session())
    own = public_path / "run"
    own.mkdir()
    os.chown(own, somebody.uid, somebody.uid)
    assert pid_by_status(somebody.session(f"XDG_RUNTIME_DIR={own}")) == it.forwarder.pid


@pytest.mark.parametrize("what", ["of another user", "a link", "open to others"])
def test_a_directory_where_others_may_write_is_used_by_nobody(
    launch: Launch, somebody: Somebody, address: tuple[str, int], public_path: Path, what: str
) -> None:
    """Neither does an instance listen there, nor does a command ask who does."""
    place = somebody.directory
    if what == "a link":
        place.symlink_to(public_path)
        os.chown(public_path, somebody.uid, somebody.uid)
    else:
        place.mkdir()
        place.chmod(0o755)
    if what == "open to others":
        os.chown(place, somebody.uid, somebody.uid)
        place.chmod(0o777)
    with ExitStack() as stack:
        impostor = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        impostor.bind(str(place / "control.sock"))
        (place / "control.sock").chmod(0o777)
        impostor.listen()
        impostor.setblocking(False)
        pair = ("-l", "{}:{}".format(*address), "-r", "127.0.0.1:1", "--workers", "1")
        it = launch(*pair, prefix=somebody.session())
        it.wait_logged(f"no control socket at {place}/control.sock: not a directory of this user")
        done = run_command("status", prefix=somebody.session())
        assert done.returncode == 69
        assert f"{place}: not a directory of this user alone, of mode 0700; hint: " in done.stderr
        with pytest.raises(BlockingIOError):
            impostor.accept()
        assert [path.name for path in place.iterdir()] == ["control.sock"]
        assert it.stop() == 0


@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["leads nowhere yet", "leads into a secret"])
def test_a_link_of_another_user_in_the_place_of_the_directory_is_not_followed(
    somebody: Somebody, public_path: Path, mode: int
) -> None:
    """That user may make a directory where it leads at any moment, and listen in it."""
    public_path.chmod(mode)
    somebody.directory.symlink_to(public_path / "later")
    done = run_command("status", prefix=somebody.session())
    assert done.returncode == 69, done.stderr
    assert "not a directory of this user alone, of mode 0700; hint: " in done.stderr


LOOKING_ELSEWHERE = """
import sys
from pathlib import Path
from forwarder.control import path
path._SYSTEM_DIRECTORY = Path(sys.argv.pop(1))
from forwarder.cli.main import main
main()
"""


def test_who_may_not_look_where_the_service_has_it_is_told_so(
    launch: Launch, somebody: Somebody, address: tuple[str, int], public_path: Path
) -> None:
    """Of a service whose directory is for itself alone."""
    of_service = public_path / "run"
    of_service.mkdir(mode=0o700)
    control = of_service / "control.sock"
    it = launch("-l", "{}:{}".format(*address), "-r", "127.0.0.1:1", "--control", str(control))
    assert ask(control, "status")["pid"] == it.pid
    command = [sys.executable, "-c", LOOKING_ELSEWHERE, str(of_service), "status"]
    done = subprocess.run(
        [*somebody.session(), *command], capture_output=True, text=True, check=False
    )
    assert "permission denied; hint: ask as root or as its user" in done.stderr
    assert done.returncode == 77
