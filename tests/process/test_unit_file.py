"""deploy/systemd: the units are valid, and the program does its work under their restrictions."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import procfs
from support.configured import rule
from support.echo import Echo, ask_tcp, ask_udp
from support.hosts import own_host
from support.processes import COMMAND, listeners
from support.programs import debian
from support.sandbox import SCRIPT, USER
from support.unitfile import read_unit, words
from support.waiting import eventually

from forwarder.config.model import STOP_TIMEOUT_S
from forwarder.errors import ExitCode
from process.test_activation import activate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from process.conftest import Launch

pytestmark = pytest.mark.process

SYSTEMD: Final = Path(__file__).parents[2] / "deploy" / "systemd"
UNIT: Final = SYSTEMD / "forwarder.service"
UNITS: Final = sorted(path.name for path in SYSTEMD.iterdir() if path.is_file())
# Of 100; what is left is what the program is for (network, low ports) and needs (capset, /proc).
EXPOSURE: Final = 16
# The last client has gone, which the worker may have yet to hear.
STOPPED: Final = r"stopped(: \d+ ended, 0 reset after [0-9.]+ s)?\n"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can restrict others")


@debian("systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """With a program where ExecStart= says. Result: not a word."""
    program = tmp_path / "forwarder"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in UNITS:
        text = (SYSTEMD / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/forwarder", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@debian("systemd-analyze")
def test_the_service_is_exposed_as_little_as_stated() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_drop_in_only_changes_how_a_reload_is_asked_for() -> None:
    """Older versions of systemd do not know the type, so no tool here can look at it."""
    drop_in = read_unit(SYSTEMD / "forwarder.service.d" / "notify-reload.conf")
    assert {key: value for key, value in drop_in.items() if value} == {"Type": ["notify-reload"]}
    assert "ExecReload" in drop_in


def test_the_unit_knows_the_exit_codes_and_the_time_a_stop_takes() -> None:
    unit = read_unit(UNIT)
    final = {ExitCode.USAGE, ExitCode.NO_PERMISSION, ExitCode.CONFIG}
    assert set(map(int, words(unit, "RestartPreventExitStatus"))) == final
    assert int(unit["TimeoutStopSec"][0]) > STOP_TIMEOUT_S + 5


@pytest.mark.parametrize("name", ["forwarder.socket", "forwarder-udp.socket"])
def test_a_socket_unit_belongs_to_the_service(name: str) -> None:
    unit = read_unit(SYSTEMD / name)
    assert unit.get("Service", ["forwarder.service"]) == ["forwarder.service"]
    assert unit["ReusePort"] == ["yes"]


class Site:
    """A forwarder under the restrictions of the unit, and the directories that it may write to."""

    def __init__(
        self, directory: Path, launch: Launch, upstreams: Echo, *, is_activated: bool = False
    ) -> None:
        self.run = self._writable(directory / "run")
        self.log = self._writable(directory / "log")
        self.config = directory / "forwarder.toml"
        self.upstreams = upstreams
        self.low = [(own_host(i), 81) for i in (1, 2)]
        self.udp = ("127.0.0.2", upstreams.udp[0][1])
        self.prefix = [sys.executable, str(SCRIPT), str(UNIT), str(self.run), str(self.log), "--"]
        self.write(self.low[0])
        start = shlex.split(read_unit(UNIT)["ExecStart"][0])
        assert start == ["/usr/local/bin/forwarder", "-c", "/etc/forwarder/forwarder.toml"]
        given = activate(self.low[0], self.low[0], kind="shared") if is_activated else []
        self.forwarder = launch("-c", str(self.config), prefix=[*given, *self.prefix])

    @staticmethod
    def _writable(path: Path) -> Path:
        path.mkdir()
        os.chown(path, USER, USER)
        return path

    def write(self, *low: tuple[str, int]) -> None:
        """The configuration: TCP at these addresses, UDP, and all that makes a file."""
        self.config.write_text(
            f'workers = 2\npid_file = "{self.run}/forwarder.pid"\n'
            f'[[logs]]\nto = "{self.log}/forwarder.json"\n'
            + "".join(rule(address, self.upstreams.tcp[0]) for address in low)
            + rule(self.udp, self.upstreams.udp[0], 'protocol = "udp"\ntimeout = 1')
            + f'[[forwarding_rules]]\nlisten = "unix:{self.run}/web.sock"\n'
            + 'upstream = "{}:{}"\n'.format(*self.upstreams.tcp[0])
        )

    def ask(self, *arguments: str) -> str:
        """Run a command as the unit would, and give what it says."""
        done = subprocess.run(
            [*self.prefix, *COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def master(self) -> int:
        """The process that the pid file names."""
        return int((self.run / "forwarder.pid").read_text())

    def assert_serves(self, *low: tuple[str, int]) -> None:
        for address in low:
            assert ask_tcp(address).endswith("saw 127.0.0.1: hello")
        assert ask_udp(self.udp).endswith("saw 127.0.0.1: hello")


@pytest.fixture
def site(public_path: Path, launch: Launch) -> Iterator[Site]:
    """See :class:`Site`."""
    with Echo(tcp=[("127.0.0.1", 0)], udp=[("127.0.0.1", 0)]) as upstreams:
        yield Site(public_path, launch, upstreams)


def facts(pid: int) -> dict[str, str]:
    """What proc(5) says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}


@as_root
@debian("systemd-analyze", "setpriv")
def test_everything_works_under_the_restrictions_of_the_unit(site: Site) -> None:
    """Low ports, UDP, log, a worker killed, ExecReload=, an upgrade, a stop."""
    master = site.master()
    assert facts(master)["Uid"].split() == [str(USER)] * 4
    assert int(facts(master)["CapEff"], 16) == 1 << 10
    workers = procfs.children(master)
    assert len(workers) == 2
    for pid in workers:
        assert int(facts(pid)["CapPrm"], 16) == 0
        assert (facts(pid)["NoNewPrivs"], facts(pid)["Seccomp"]) == ("1", "2")
    site.assert_serves(site.low[0])

    os.kill(workers[0], 9)
    eventually(lambda: site.ask("status").count("ready") == 2)
    site.assert_serves(site.low[0])

    site.write(*site.low)
    reload = shlex.split(read_unit(UNIT)["ExecReload"][0])
    assert reload[0] == "/usr/local/bin/forwarder"
    assert "+1 -0 ~0 =3 rules, generation 2" in site.ask(*reload[1:])
    site.assert_serves(*site.low)

    assert "serves, the old one drains" in site.ask("upgrade")
    assert site.master() != master
    site.assert_serves(*site.low)
    assert (site.run / "web.sock").is_socket()
    eventually(lambda: (site.log / "forwarder.json").read_text().count('"ended"') >= 3)
    assert re.fullmatch(STOPPED, site.ask("stop"))
    assert site.forwarder.wait() == 0
    assert [path.name for path in site.run.iterdir()] == []


@as_root
@debian("systemd-analyze", "setpriv")
def test_sockets_of_a_socket_unit_are_served_by_more_workers_than_there_are(
    public_path: Path, launch: Launch
) -> None:
    """Two sockets of root at a low port. Result: three workers, though none may bind beside."""
    assert len(read_unit(SYSTEMD / "forwarder.socket")["ListenStream"]) == 2
    with Echo(tcp=[("127.0.0.1", 0)], udp=[("127.0.0.1", 0)]) as upstreams:
        site = Site(public_path, launch, upstreams, is_activated=True)
        site.assert_serves(site.low[0])
        assert site.ask("workers", "3") == "3 workers\n"
        site.assert_serves(*[site.low[0]] * 10)
        assert listeners(site.low[0]) == 2
        assert "serves, the old one drains" in site.ask("upgrade")
        site.assert_serves(*[site.low[0]] * 10)
        assert re.fullmatch(STOPPED, site.ask("stop"))
        assert site.forwarder.wait() == 0


@as_root
@debian("systemd-analyze", "setpriv")
def test_the_restrictions_are_real(site: Site) -> None:
    """What the program does not do is not possible there; so the test above means something."""
    code = (
        "import ctypes, mmap, os, socket\n"
        "def fails(act, *args):\n"
        "    try: act(*args)\n"
        "    except (OSError, ValueError): return True\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(fails(open, {str(site.config)!r}, 'a'), fails(os.setuid, 0),\n"
        "      fails(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),\n"
        "      fails(mmap.mmap, -1, 4096, mmap.MAP_PRIVATE, 7), libc.unshare(0x10000000) == -1,\n"
        f"      os.path.exists('/proc/{os.getpid()}'))\n"
    )
    done = subprocess.run(
        [*site.prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True True True True False\n"
    assert site.forwarder.stop() == 0
