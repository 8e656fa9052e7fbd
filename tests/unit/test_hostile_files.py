"""Files that another user of the machine has put where ours are to be."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.processes import NOBODY

from forwarder.config.model import LogFormat, LogPlace
from forwarder.connlog.files import LogFiles
from forwarder.errors import Place, StartupError
from forwarder.net.unixfile import listen_at
from forwarder.system.pidfile import PidFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
PRECIOUS = "root:x:0:0\n"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that nobody may touch; looked at in the end."""
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    path.chmod(0o600)
    yield path
    assert path.read_text() == PRECIOUS
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory in which everybody may write, like /tmp."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


# -- the pid file


def test_a_link_in_place_of_the_pid_file_is_not_followed(victim: Path, shared: Path) -> None:
    """Root would write its pid over a file of the system."""
    path = shared / "pid"
    path.symlink_to(victim)
    with pytest.raises(StartupError, match="is a symbolic link"):
        PidFile(str(path))
    assert path.is_symlink()


def test_a_link_to_nowhere_makes_no_pid_file_there(tmp_path: Path, shared: Path) -> None:
    (shared / "pid").symlink_to(tmp_path / "new")
    with pytest.raises(StartupError, match="is a symbolic link"):
        PidFile(str(shared / "pid"))
    assert not (tmp_path / "new").exists()


def test_another_name_of_a_file_is_no_pid_file(victim: Path, shared: Path) -> None:
    path = shared / "pid"
    path.hardlink_to(victim)
    with pytest.raises(StartupError, match="has other names, too"):
        PidFile(str(path))


def test_what_has_something_else_in_it_is_no_pid_file(victim: Path) -> None:
    """A slip of the pen in a configuration, not malice."""
    with pytest.raises(StartupError, match="something else in it than a process id"):
        PidFile(str(victim))


def test_a_fifo_in_place_of_the_pid_file_holds_up_nobody(shared: Path) -> None:
    os.mkfifo(shared / "pid")
    with pytest.raises(StartupError, match="is not a regular file"):
        PidFile(str(shared / "pid"))


def test_the_pid_in_a_locked_file_is_not_text_for_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    first = PidFile(str(path))
    path.write_text("\x1b]0;title\x07")
    with pytest.raises(StartupError, match="by another forwarder, pid unknown"):
        PidFile(str(path))
    first.remove()


def test_a_pid_file_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    """It is somebody else's now."""
    path = tmp_path / "pid"
    ours = PidFile(str(path))
    path.unlink()
    path.write_text("1\n")
    ours.remove()
    assert path.read_text() == "1\n"


def test_a_pid_file_that_a_crash_has_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("4711\n")
    ours = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    ours.remove()
    assert not path.exists()


@as_root
def test_who_owned_a_pid_file_can_write_no_other_pid_into_it(tmp_path: Path) -> None:
    """A script of root ends the process that is named there."""
    path = tmp_path / "pid"
    path.write_text("4711\n")
    path.chmod(0o666)
    os.chown(path, NOBODY, NOBODY)
    ours = PidFile(str(path))
    status = path.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o644)
    ours.remove()


# -- the connection log


def open_log(path: Path) -> LogFiles:
    """Open a place of the connection log, and leave it open."""
    files = LogFiles()
    place = LogPlace(to=str(path), format=LogFormat.JSON, place=Place("test"))
    files.use(files.prepare((place,)))
    return files


@as_root
def test_a_link_of_another_user_is_not_followed_to_a_log(victim: Path, shared: Path) -> None:
    link = shared / "log"
    link.symlink_to(victim)
    os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(StartupError, match="a link that another user can lay"):
        open_log(link)


@as_root
def test_no_link_is_followed_in_a_directory_of_another_user(victim: Path, shared: Path) -> None:
    """It may belong to the workers, and they be taken over."""
    shared.chmod(0o755)
    os.chown(shared, NOBODY, NOBODY)
    (shared / "log").symlink_to(victim)
    with pytest.raises(StartupError, match="a link that another user can lay"):
        open_log(shared / "log")
    (shared / "log").unlink()
    (shared / "log").hardlink_to(victim)
    with pytest.raises(StartupError, match="has other names, too"):
        open_log(shared / "log")


def test_another_name_of_a_file_is_no_log_where_everybody_may_write(
    victim: Path, shared: Path
) -> None:
    (shared / "log").hardlink_to(victim)
    with pytest.raises(StartupError, match="has other names, too"):
        open_log(shared / "log")


def test_a_link_of_our_own_is_followed_to_a_log(tmp_path: Path) -> None:
    """As /dev/stdout is one."""
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    files = open_log(tmp_path / "log")
    files.close()
    assert (tmp_path / "elsewhere").exists()


# -- unix sockets


def test_what_has_taken_the_place_of_a_unix_socket_keeps_its_mode(
    victim: Path, shared: Path
) -> None:
    """A link there would lead a chmod to another file."""
    path = shared / "socket"
    sock, file = listen_at(path, mode=0o600, backlog=1)
    with sock:
        file.set_mode(0o666)
        assert path.stat().st_mode & 0o777 == 0o666
        path.unlink()
        path.symlink_to(victim)
        file.set_mode(0o666)
        file.remove()
    assert path.is_symlink()


def test_a_link_in_place_of_a_unix_socket_stays_as_it_is(victim: Path, shared: Path) -> None:
    path = shared / "socket"
    path.symlink_to(victim)
    with pytest.raises(OSError, match="not a socket"):
        listen_at(path, mode=0o600, backlog=1)
    assert path.is_symlink()
