"""Workers that run as somebody else, while the master stays root to bind low ports."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import procfs
from support.configured import Configured, rule
from support.ends import accept, carry, connect
from support.hosts import own_host
from support.loads import Load
from support.processes import NOBODY, as_nobody, listeners, members, run_command
from support.waiting import eventually

from forwarder.system.privileges import _MASTER_CAPABILITIES
from process.conftest import as_pairs

if TYPE_CHECKING:
    import socket

    from process.conftest import Launch, Serve

pytestmark = pytest.mark.process

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
AS_NOBODY: Final = ("--user", "nobody")


def facts(pid: int) -> dict[str, list[str]]:
    """What /proc says of the rights of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def low_address(number: int) -> tuple[str, int]:
    """An address with a low port that no other test run uses."""
    return own_host(number), 81


def assert_unprivileged(pid: int) -> None:
    found = facts(pid)
    assert found["Uid"] == [str(NOBODY)] * 4
    assert found["Gid"] == [str(NOBODY)] * 4
    assert found["Groups"] == []
    assert found["NoNewPrivs"] == ["1"]
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(found[kind][0], 16) == 0, kind


@as_root
def test_workers_have_no_rights_and_no_way_back(serve: Serve) -> None:
    """One that is started later in place of one that died, too."""
    service = serve(*AS_NOBODY, workers=2)
    for pid in service.forwarder.workers():
        assert_unprivileged(pid)
    assert facts(service.forwarder.pid)["Uid"] == ["0"] * 4
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        rights = int(facts(service.forwarder.pid)[kind][0], 16)
        assert rights & 1 << 10, f"{kind}: cannot bind low ports any more"
        assert not rights & ~_MASTER_CAPABILITIES, kind
    service.assert_serves()
    service.kill_worker(service.forwarder.workers()[0])
    for pid in service.forwarder.workers():
        assert_unprivileged(pid)
    service.assert_serves()
    assert service.stop() == 0


@as_root
def test_a_group_of_its_own(serve: Serve) -> None:
    service = serve("--user", "nobody", "--group", "daemon")
    (pid,) = service.forwarder.workers()
    assert facts(pid)["Uid"] == [str(NOBODY)] * 4
    assert facts(pid)["Gid"] == ["1"] * 4
    service.assert_serves()
    assert service.stop() == 0


def test_without_a_user_workers_have_no_way_up(serve: Serve) -> None:
    service = serve()
    (pid,) = service.forwarder.workers()
    assert facts(pid)["NoNewPrivs"] == ["1"]
    assert facts(pid)["Uid"] == [str(os.geteuid())] * 4
    assert service.stop() == 0


@as_root
def test_low_ports_at_the_start_and_by_a_reload(
    launch: Launch, tmp_path: Path, upstream: socket.socket
) -> None:
    path = tmp_path / "forwarder.toml"
    addresses = low_address(1), low_address(2)
    rules = [rule(address, upstream.getsockname()) for address in addresses]
    head = 'user = "nobody"\nworkers = 2\n'
    path.write_text(head + rules[0])
    it = Configured(launch("-c", str(path)), path)
    assert "+1 -0 ~0 =1" in it.reload(head + "".join(rules))
    for pid in it.forwarder.workers():
        assert_unprivileged(pid)
    for address in addresses:
        with connect(address) as client, accept(upstream) as peer:
            carry(client, peer, b"there")
    assert it.forwarder.stop() == 0


@as_root
def test_one_capability_is_enough_for_low_ports(
    launch: Launch, public_path: Path, upstream: socket.socket
) -> None:
    """Nobody, with CAP_NET_BIND_SERVICE: at the start and by a reload; the workers lose it."""
    path = public_path / "forwarder.toml"
    addresses = low_address(3), low_address(4)
    rules = [rule(address, upstream.getsockname()) for address in addresses]
    path.write_text("workers = 2\n" + rules[0])
    ambient = ["--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service"]
    it = Configured(launch("-c", str(path), prefix=[*as_nobody(), *ambient]), path)
    assert facts(it.forwarder.pid)["Uid"] == [str(NOBODY)] * 4
    assert int(facts(it.forwarder.pid)["CapEff"][0], 16) == 1 << 10
    assert "+1 -0 ~0 =1" in it.reload("workers = 2\n" + "".join(rules))
    for address in addresses:
        with connect(address) as client, accept(upstream) as peer:
            carry(client, peer, b"there")
    for pid in it.forwarder.workers():
        assert_unprivileged(pid)
    assert it.forwarder.stop() == 0


def test_an_unknown_user_is_a_bad_configuration(address: tuple[str, int]) -> None:
    done = run_command("-l", "{}:{}".format(*address), "-r", "127.0.0.1:1", "--user", "nosuchuser")
    assert done.returncode == 78
    assert "no such user or group" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_root_can_name_another_user(address: tuple[str, int]) -> None:
    done = run_command(
        *("-l", "{}:{}".format(*address), "-r", "127.0.0.1:1", "--user", "root"),
        prefix=as_nobody(),
    )
    assert done.returncode == 77
    assert "only root" in done.stderr
    assert "Traceback" not in done.stderr


@as_root
def test_a_new_master_takes_over_from_orphans_that_have_no_rights(
    serve: Serve, launch: Launch
) -> None:
    """The master is root, its orphans are not. Result: nobody is dropped."""
    old = serve(*AS_NOBODY, workers=2)
    with Load(old.address, old.upstream, rate=200, streams=3) as load:
        load.wait_served(50)
        os.kill(old.forwarder.pid, signal.SIGKILL)
        old.forwarder.process.wait()
        load.wait_served(50)
        new = launch(*old.pairs, "--workers", "2", *AS_NOBODY)
        new.wait_logged("took over 2 sockets")
        load.wait_served(100)
        account = load.stop()
    assert account.dropped == 0, account.problems
    eventually(lambda: not members(old.forwarder.pid), "orphans stay")
    for pid in new.workers():
        assert_unprivileged(pid)
    assert new.stop() == 0
    assert listeners(old.address) == 0


@as_root
def test_who_is_not_root_gets_no_sockets_of_anothers_orphans(serve: Serve, launch: Launch) -> None:
    """An instance of nobody may not take over what root's workers serve; the address is taken."""
    old = serve(workers=1)
    os.kill(old.forwarder.pid, signal.SIGKILL)
    old.forwarder.process.wait()
    old.forwarder.wait_logged("worker.orphaned")
    other = launch(
        *as_pairs(old.address, old.upstream),
        *("--workers", "1"),
        prefix=as_nobody(),
        expect_ready=False,
    )
    assert other.wait() == 69
    old.assert_serves()


def test_workers_have_no_descriptor_of_who_started_it(
    launch: Launch, address: tuple[str, int], upstream: socket.socket
) -> None:
    """A shell of root, say, that has a file open; neither has the helper that looks names up."""
    name = f"localhost:{upstream.getsockname()[1]}"
    shell = ["sh", "-c", 'exec 7</etc/passwd 8</etc/group; exec "$@"', "sh"]
    arguments = ("-l", f"{address[0]}:{address[1]}", "-r", name, "--workers", "2")
    it = launch(*arguments, prefix=shell)
    for pid in procfs.children(it.pid):
        assert not {"/etc/passwd", "/etc/group"} & {*procfs.descriptors(pid).values()}
    with connect(address) as client, accept(upstream) as far:
        carry(client, far, b"served")
    assert it.stop() == 0
