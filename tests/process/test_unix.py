"""The files of unix sockets that are listened on: made, taken over, left alone, removed."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.configured import Configured
from support.ends import accept, carry, connect, listen, listen_unix
from support.processes import NOBODY, as_nobody, members, run_command
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = pytest.mark.process


class Site:
    """A directory with the configuration of a forwarder that listens there, and its upstream."""

    def __init__(self, launch: Launch, directory: Path, upstream: socket.socket) -> None:
        self._launch = launch
        self.directory = directory
        self.upstream = upstream
        self.path = directory / "in.sock"
        self.config = directory / "forwarder.toml"
        self.pid_file = directory / "forwarder.pid"
        self.control = directory / "control.sock"

    def text(self, *names: str, more: str = "") -> str:
        """A configuration with a rule for each name of a socket in the directory."""
        target = "{}:{}".format(*self.upstream.getsockname())
        head = f'workers = 2\npid_file = "{self.pid_file}"\ncontrol = "{self.control}"\n'
        return head + "".join(
            f'[[forwarding_rules]]\nlisten = "unix:{self.directory}/{name}"\n'
            f'upstream = "{target}"\n{more}\n'
            for name in names
        )

    def start(self, *names: str, more: str = "") -> Configured:
        """Start it, with one socket by default."""
        self.config.write_text(self.text(*(names or ("in.sock",)), more=more))
        return Configured(self._launch("-c", str(self.config)), self.config)

    def assert_serves(self, path: Path | str | None = None) -> None:
        """Clients get through, more than there are workers."""
        for _ in range(4):
            with connect(str(path or self.path)) as client, accept(self.upstream) as far:
                carry(client, far, b"there" * 1000)
                carry(far, client, b"back" * 1000)

    def identity(self) -> tuple[int, int]:
        """Which file it is."""
        status = self.path.lstat()
        return status.st_dev, status.st_ino

    def master(self) -> int:
        """The pid in the pid file."""
        return int(self.pid_file.read_text())

    def upgrade(self) -> None:
        """Upgrade by the command."""
        done = run_command("upgrade", "--control", str(self.control))
        assert done.returncode == 0, done.stderr


@pytest.fixture
def site(launch: Launch, public_path: Path, upstream: socket.socket) -> Site:
    """See :class:`Site`."""
    return Site(launch, public_path, upstream)


def wait_gone(path: Path) -> None:
    eventually(lambda: not path.exists(), f"{path} stays")


def kill_all(forwarder: Forwarder) -> None:
    """Kill the master, then all of its workers: nobody can clean up."""
    forwarder.process.kill()
    forwarder.process.wait()
    for pid in members(forwarder.pid):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not members(forwarder.pid))


# -- made and removed


@pytest.mark.parametrize("mode", ["0600", "0666", "0660", None])
def test_the_file_has_its_mode_and_goes_at_the_end(site: Site, mode: str | None) -> None:
    it = site.start(more=f'mode = "{mode}"' if mode else "")
    assert stat.S_IMODE(site.path.lstat().st_mode) == int(mode or "0660", 8)
    site.assert_serves()
    assert it.forwarder.stop() == 0
    assert not site.path.exists()


def test_an_abstract_name_is_free_again_at_the_end(
    launch: Launch, site: Site, tmp_path: Path
) -> None:
    target = "{}:{}".format(*site.upstream.getsockname())
    for _ in range(2):
        it = launch("-l", f"unix:@{tmp_path}", "-r", target, "--workers", "2")
        site.assert_serves(f"\0{tmp_path}")
        assert it.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        connect(f"\0{tmp_path}")


def test_sessions_go_on_while_it_stops_and_who_comes_finds_nothing(site: Site) -> None:
    it = site.start()
    with connect(str(site.path)) as client, accept(site.upstream) as far:
        it.forwarder.signal(signal.SIGTERM)
        wait_gone(site.path)
        carry(client, far, b"still")
        carry(far, client, b"here")
    assert it.forwarder.wait() == 0


def test_a_file_that_somebody_put_in_its_place_is_left_alone(site: Site) -> None:
    it = site.start()
    site.path.unlink()
    with listen_unix(str(site.path)):
        assert it.forwarder.stop() == 0
        assert site.path.exists()


def test_a_directory_that_vanishes_is_no_reason_to_fail(site: Site) -> None:
    """The sessions go on, too."""
    directory = site.directory / "sub"
    directory.mkdir()
    it = site.start("sub/in.sock")
    with connect(str(directory / "in.sock")) as client, accept(site.upstream) as far:
        (directory / "in.sock").unlink()
        directory.rmdir()
        carry(client, far, b"still here")
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


# -- refused


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("served", 69, "Address already in use"),
        ("served, queue full", 69, "Address already in use"),
        ("file", 69, "no socket"),
        ("directory", 69, "no socket"),
        ("no directory", 69, "No such file or directory"),
        ("closed directory", 77, "Permission denied"),
    ],
)
def test_what_is_in_the_way_is_named_and_stays(
    public_path: Path, kind: str, code: int, said: str
) -> None:
    path = public_path / "in.sock"
    with ExitStack() as stack:
        if kind.startswith("served"):
            stack.enter_context(listen_unix(str(path), backlog=0))
            if "full" in kind:
                stack.enter_context(connect(str(path)))
        elif kind == "file":
            path.write_text("mine")
        elif kind == "directory":
            path.mkdir()
        else:
            path = public_path / "sub" / "in.sock"
            if kind == "closed directory":
                path.parent.mkdir(0o555)
        there = path.exists()
        if kind != "closed directory":
            public_path.chmod(0o777)
        ended = run_command("-l", f"unix:{path}", "-r", "127.0.0.1:1", prefix=as_nobody())
        assert path.exists() is there
    assert ended.returncode == code, ended
    assert f"cannot listen on unix:{path}: " in ended.stderr
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_second_instance_is_refused_and_the_first_serves_on(site: Site) -> None:
    it = site.start()
    before = site.identity()
    ended = run_command("-l", f"unix:{site.path}", "-r", "127.0.0.1:1")
    assert ended.returncode == 69
    assert "ss -lxp" in ended.stderr
    accept(site.upstream).close()  # it looked whether somebody is there
    assert site.identity() == before
    site.assert_serves()
    assert it.forwarder.stop() == 0


def test_a_start_that_fails_leaves_no_file(site: Site) -> None:
    """The third of three rules cannot listen."""
    (site.directory / "c.sock").write_text("in the way")
    site.config.write_text(site.text("a.sock", "b.sock", "c.sock"))
    assert run_command("-c", str(site.config)).returncode == 69
    assert sorted(path.name for path in site.directory.glob("*.sock")) == ["c.sock"]


# -- left by somebody


def test_a_stale_file_is_replaced(site: Site) -> None:
    listen_unix(str(site.path)).close()
    it = site.start()
    site.assert_serves()
    assert it.forwarder.stop() == 0
    assert not site.path.exists()


def test_a_restart_after_all_were_killed_works(site: Site) -> None:
    kill_all(site.start().forwarder)
    assert site.path.exists()
    it = site.start()
    site.assert_serves()
    assert it.forwarder.stop() == 0
    assert not site.path.exists()


def test_a_new_master_takes_the_socket_of_orphans_over(site: Site) -> None:
    """The same socket, so who is queued is served, and the file stays the same one."""
    old = site.start()
    before = site.identity()
    old.forwarder.process.kill()
    old.forwarder.process.wait()
    eventually(lambda: sum("worker.orphaned" in it for it in old.forwarder.lines) == 2)
    site.assert_serves()
    new = site.start()
    new.forwarder.wait_logged("took over 1 sockets")
    assert site.identity() == before
    eventually(lambda: not members(old.forwarder.pid), "orphans stay")
    site.assert_serves()
    assert new.forwarder.stop() == 0
    assert not site.path.exists()


def test_orphans_whose_file_is_gone_are_no_hindrance(site: Site) -> None:
    """Nobody could reach their socket. Result: a new one at the path."""
    old = site.start()
    old.forwarder.process.kill()
    old.forwarder.process.wait()
    eventually(lambda: sum("worker.orphaned" in it for it in old.forwarder.lines) == 2)
    site.path.unlink()
    new = site.start()
    site.assert_serves()
    assert new.forwarder.stop() == 0
    assert not site.path.exists()


def test_a_killed_worker_is_replaced_and_its_socket_served(site: Site) -> None:
    it = site.start()
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: pid not in it.forwarder.workers())  # type: ignore[misc]  # its default is the type
        site.assert_serves()
    assert it.forwarder.stop() == 0


# -- reloads and upgrades


def test_a_reload_keeps_changes_and_removes_sockets(site: Site) -> None:
    """One stays with another mode and the same file, one goes with its file, one comes."""
    it = site.start("in.sock", "old.sock")
    before = site.identity()
    assert "+1 -1 ~1 =0" in it.reload(site.text("in.sock", "new.sock", more='mode = "0600"'))
    assert site.identity() == before
    assert stat.S_IMODE(site.path.lstat().st_mode) == 0o600
    site.assert_serves()
    site.assert_serves(site.directory / "new.sock")
    wait_gone(site.directory / "old.sock")
    assert it.forwarder.stop() == 0
    assert not list(site.directory.glob("*.sock"))


def test_a_rule_that_goes_and_comes_back_is_served(site: Site) -> None:
    """At once, while its socket is still open, and after it was closed."""
    it = site.start("in.sock", "other.sock")
    path = site.directory / "other.sock"
    both, one = site.text("in.sock", "other.sock"), site.text("in.sock")
    it.reload(one)
    it.reload(both)
    site.assert_serves(path)
    it.reload(one)
    wait_gone(path)
    it.reload(both)
    site.assert_serves(path)
    assert it.forwarder.stop() == 0


def test_a_reload_that_is_refused_leaves_no_file(site: Site) -> None:
    it = site.start()
    (site.directory / "taken.sock").write_text("in the way")
    outcome = it.reload(site.text("in.sock", "new.sock", "taken.sock"))
    assert "stays in force" in outcome
    assert not (site.directory / "new.sock").exists()
    site.assert_serves()
    assert it.forwarder.stop() == 0


def test_a_resize_shares_the_socket_with_more_and_with_fewer(site: Site) -> None:
    it = site.start()
    before = site.identity()
    it.resize(signal.SIGTTIN, 3)
    site.assert_serves()
    it.resize(signal.SIGTTOU, 2)
    it.resize(signal.SIGTTOU, 1)
    site.assert_serves()
    assert site.identity() == before
    assert it.forwarder.stop() == 0


def test_an_upgrade_keeps_the_file_and_the_last_one_removes_it(site: Site) -> None:
    """With a session of the old one, which ends later and removes nothing."""
    old = site.start()
    before = site.identity()
    with connect(str(site.path)) as client, accept(site.upstream) as far:
        site.upgrade()
        assert site.identity() == before
        carry(client, far, b"still here")
    assert old.forwarder.process.wait(30) == 0
    assert site.identity() == before
    site.assert_serves()
    site.upgrade()
    site.assert_serves()
    os.kill(site.master(), signal.SIGTERM)
    wait_gone(site.path)


def test_an_upgrade_that_fails_leaves_the_file_and_what_serves_it(site: Site) -> None:
    """The new code wants one more socket, which cannot be had. Nothing of its own is left."""
    it = site.start()
    before = site.identity()
    (site.directory / "taken.sock").write_text("in the way")
    site.config.write_text(site.text("in.sock", "new.sock", "taken.sock", more='mode = "0600"'))
    done = run_command("upgrade", "--control", str(site.control))
    assert done.returncode == 1
    assert site.identity() == before
    assert stat.S_IMODE(site.path.lstat().st_mode) == 0o660
    assert not (site.directory / "new.sock").exists()
    site.assert_serves()
    assert it.forwarder.stop() == 0
    assert not site.path.exists()


def test_an_upgrade_removes_the_file_of_a_rule_that_is_gone(site: Site) -> None:
    """Nobody else would: the old one leaves all files to the new one."""
    site.start("in.sock", "old.sock")
    site.config.write_text(site.text("in.sock"))
    site.upgrade()
    assert not (site.directory / "old.sock").exists()
    site.assert_serves()
    os.kill(site.master(), signal.SIGTERM)
    wait_gone(site.path)


def test_an_upgrade_makes_a_file_again_that_was_removed(site: Site) -> None:
    site.start()
    site.path.unlink()
    site.upgrade()
    site.assert_serves()
    os.kill(site.master(), signal.SIGTERM)
    wait_gone(site.path)


# -- other users, other owners


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_workers_that_run_as_somebody_else_serve_and_connect(launch: Launch, site: Site) -> None:
    """A file in a directory of another user, and an upstream that only nobody may write to."""
    directory = site.directory / "sub"
    directory.mkdir(0o755)
    os.chown(directory, 1, 1)
    up = site.directory / "up.sock"
    with listen_unix(str(up)) as upstream:
        up.chmod(0o600)
        os.chown(up, NOBODY, NOBODY)
        path = directory / "in.sock"
        arguments = ("-l", f"unix:{path}", "-r", f"unix:{up}", "--workers", "2")
        it = launch(*arguments, "--user", "nobody")
        with connect(str(path)) as client, accept(upstream) as far:
            carry(client, far, b"there")
        assert stop(it, signal.SIGTERM) == 0
        assert not path.exists()


@pytest.fixture
def given(site: Site) -> list[str]:
    """A prefix that hands a unix socket over as a service manager does."""
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
        "s.listen(); os.dup2(s.fileno(), 3); os.set_inheritable(3, True);"
        "os.environ['LISTEN_FDS'] = '1';"
        "os.environ['LISTEN_PID'] = str(os.getpid()); os.execvp(sys.argv[2], sys.argv[2:])"
    )
    return ["python3", "-c", code, str(site.path)]


def test_the_file_of_a_service_manager_is_left_to_it(
    launch: Launch, site: Site, given: list[str]
) -> None:
    """After an upgrade, too."""
    site.config.write_text(site.text("in.sock"))
    it = launch("-c", str(site.config), prefix=given)
    site.assert_serves()
    site.upgrade()
    site.assert_serves()
    master = site.master()
    os.kill(master, signal.SIGTERM)
    wait_gone(site.pid_file)
    eventually(lambda: master not in members(it.pid))
    assert site.path.exists()


def test_a_tcp_rule_beside_it_is_not_touched(site: Site, launch: Launch) -> None:
    """One configuration with both kinds; a client of each."""
    with listen() as upstream:
        target = "{}:{}".format(*upstream.getsockname())
        with listen() as probe:
            port = probe.getsockname()[1]
        it = launch(
            *("-l", f"unix:{site.path}", "-r", target, "-l", f"127.0.0.1:{port}", "-r", target),
        )
        for address in (str(site.path), ("127.0.0.1", port)):
            with connect(address) as client, accept(upstream) as far:
                carry(client, far, b"there")
        assert it.stop() == 0
