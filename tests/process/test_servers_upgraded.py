"""What is said of the servers of groups goes from master to master, whatever that one was."""

from __future__ import annotations

import mmap
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.ends import written
from support.forwarder import reserve_port
from support.upgraded import Site, assert_alive
from support.waiting import eventually

from forwarder.balancing.table import DRAINS, FULL, HAS_ORDER, ORDER, ServerTable
from forwarder.stats.board import BOARD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from process.conftest import Launch

pytestmark = pytest.mark.process

DRAIN = HAS_ORDER | DRAINS


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


@pytest.fixture
def spare() -> Iterator[tuple[str, int]]:
    """Where a balanced rule listens."""
    with reserve_port() as holder:
        yield holder.getsockname()


def group(listen: tuple[str, int], *servers: str) -> str:
    """A rule with several upstreams, of which no client asks."""
    texts = ", ".join(f'"127.0.0.1:{one}"' for one in servers)
    return (
        f'[[forwarding_rules]]\nname = "web"\nlisten = "{written(listen)}"\nupstream = [{texts}]\n'
    )


def table_fd(pid: int) -> int:
    """The descriptor of the table of servers in a master."""
    (found,) = (fd for fd, what in procfs.descriptors(pid).items() if "forwarder-servers" in what)
    return int(found)


@pytest.fixture
def table_of() -> Iterator[Callable[[int], ServerTable]]:
    """The table of a master, for the test to read and to write."""
    with ExitStack() as stack:

        def open_table(pid: int) -> ServerTable:
            table = ServerTable(os.open(f"/proc/{pid}/fd/{table_fd(pid)}", os.O_RDWR))
            stack.callback(table.close)
            return table

        yield open_table


def workers(pid: int) -> list[int]:
    """The workers of a master, of which there are several."""
    return [
        one for one in procfs.children(pid) if procfs.title(one).startswith("forwarder: worker")
    ]


def inode_of(pid: int) -> int:
    return Path(f"/proc/{pid}/fd/{table_fd(pid)}").stat().st_ino


def mapped_by(pid: int) -> int:
    """Which table a worker reads, by its inode."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    (line,) = (one for one in maps.splitlines() if "forwarder-servers" in one)
    return int(line.split()[4])


@pytest.mark.usefixtures("keeping")
def test_the_workers_of_both_masters_read_one_table(
    site: Site, spare: tuple[str, int], table_of: Callable[[int], ServerTable]
) -> None:
    """*Result*: what was said before an upgrade stands after it; what is said then is for both."""
    old = site.start()
    site.config.write_text(site.text(more=group(spare, "1", "2")))
    site.signal(signal.SIGHUP)
    site.wait_logged("master.reloaded")
    link = site.link()
    table = table_of(old)
    table.order(2, DRAIN)
    # Another order of the configuration: seats go by names.
    site.config.write_text(site.text(more=group(spare, "3", "2", "1")))
    new = site.upgrade()
    assert inode_of(new) == inode_of(old)
    eventually(lambda: len(workers(old)) == 1)
    for worker in (*workers(old), *workers(new)):
        assert mapped_by(worker) == inode_of(new)
    assert table.words[2 * 8] == DRAIN
    assert [table.words[seat * 8] for seat in (1, 3, 4)] == [0, 0, 0]
    assert_alive(link)
    link.close()
    site.wait_gone(old)
    site.stop()


@pytest.mark.usefixtures("keeping")
def test_seats_of_a_group_that_goes_are_kept_while_an_old_master_reads_them(
    site: Site, spare: tuple[str, int], table_of: Callable[[int], ServerTable]
) -> None:
    """Its workers would take an order about another server for one about theirs."""
    site.start()
    site.config.write_text(site.text(more=group(spare, "1", "2")))
    old = site.upgrade()
    link = site.link()
    table = table_of(old)
    table.order(1, DRAIN)
    site.config.write_text(site.text())
    new = site.upgrade()
    for number in range(1, 4):
        site.signal(signal.SIGHUP)
        site.wait_logged(rf"\[{new}\] INFO master.reloaded", times=number)
    assert table.words[8] == DRAIN
    link.close()
    site.wait_gone(old)
    for number in range(4, 6):
        site.signal(signal.SIGHUP)
        site.wait_logged(rf"\[{new}\] INFO master.reloaded", times=number)
    assert table.words[8] == 0
    site.stop()


def test_a_successor_that_fails_leaves_the_table_as_it_was(
    site: Site, spare: tuple[str, int], table_of: Callable[[int], ServerTable]
) -> None:
    old = site.start()
    site.config.write_text(site.text(more=group(spare, "1", "2")))
    site.signal(signal.SIGHUP)
    site.wait_logged("master.reloaded")
    table = table_of(old)
    table.order(1, DRAIN)
    os.kill(site.begin_upgrade(), signal.SIGKILL)
    site.wait_logged("did not come to serve")
    assert table.words[8] == DRAIN
    site.assert_serves()
    site.stop()


def test_a_board_is_closed_when_its_worker_has_gone(site: Site) -> None:
    """*Result*: descriptors of a master do not grow with the workers that it has had."""
    master = site.start(workers=2)

    def boards() -> int:
        return sum("forwarder-board" in what for what in procfs.descriptors(master).values())

    eventually(lambda: boards() == 2)
    for _ in range(3):
        gone = workers(master)[0]
        os.kill(gone, signal.SIGKILL)
        eventually(lambda gone=gone: gone not in workers(master))  # type: ignore[misc]
        eventually(lambda: len(workers(master)) == boards() == 2)
    for worker in workers(master):
        kinds = procfs.descriptors(worker).values()
        assert not [what for what in kinds if re.search("forwarder-(board|servers)", what)]
    site.stop()


def test_a_board_cannot_be_written_to_from_outside(site: Site) -> None:
    """Not even by the user that it belongs to: only a worker counts on it."""
    master = site.start(workers=1)
    (fd,) = (fd for fd, what in procfs.descriptors(master).items() if "forwarder-board" in what)
    again = os.open(f"/proc/{master}/fd/{fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, BOARD_BYTES)
        mmap.mmap(again, BOARD_BYTES, prot=mmap.PROT_READ).close()
    finally:
        os.close(again)
    site.stop()


# Executes what follows as the successor of a master that has died meanwhile and gave it anything.
PREDECESSOR = f"""
import os, socket, sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from forwarder.balancing.table import TABLE_BYTES
from forwarder.system import memfile
def text(content):
    fd = os.memfd_create("text"); os.write(fd, content); return fd
what, *command = sys.argv[1:]
line, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
table = memfile.make("forwarder-servers", TABLE_BYTES)
os.pwrite(table, b"\\xff" * TABLE_BYTES, 0)
given = {{
    "older": "",
    "stale": "0,1",
    "short": [memfile.make("table", 4096), text(b"{{}}")],
    "words": [table, text(b"what is this")],
    "deep": [table, text(b"[" * 100000)],
    "good": [table, text(b'{{"layout": 1, "seats": [["web", "127.0.0.1:1", 7]]}}')],
}}[what]
fds = [line.fileno(), *(given if isinstance(given, list) else ())]
for fd in fds:
    os.set_inheritable(fd, True)
os.environ["FORWARDER_READY_FD"] = str(line.fileno())
if given:
    numbers = given if isinstance(given, str) else ",".join(map(str, given))
    os.environ["FORWARDER_SERVERS_FDS"] = numbers
os.execv(command[0], command)
"""


@pytest.mark.parametrize(
    ("what", "is_used", "warning"),
    [
        ("older", False, ""),
        ("stale", False, ""),
        ("short", False, ""),
        ("words", False, "servers: cannot read the seats of the predecessor"),
        ("deep", False, "servers: cannot read the seats of the predecessor"),
        ("good", True, ""),
    ],
)
def test_a_successor_serves_whatever_it_was_given(
    launch: Launch,
    site: Site,
    spare: tuple[str, int],
    table_of: Callable[[int], ServerTable],
    what: str,
    is_used: bool,
    warning: str,
) -> None:
    """Its words may be anything: here all bits are set, and it is used only if its seats are."""
    site.config.write_text(site.text(more=group(spare, "1", "2")))
    prefix = [sys.executable, "-c", PREDECESSOR, what]
    site.forwarder = launch("-c", str(site.config), prefix=prefix)
    site.assert_serves()
    lines = "\n".join(site.forwarder.lines)
    assert warning in lines
    assert ("servers:" in lines) == bool(warning)
    table = table_of(site.master())
    assert (set(table.words[10 * 8 : 11 * 8]) == {2**64 - 1}) == is_used
    if is_used:
        assert table.word(7, ORDER) == 2**64 - 1, "an order is kept"
        for seat in (5, 6):  # of those below it, the last are given first
            assert table.weight(seat, 1) == FULL, "it says nothing of who has it now"
    site.stop()
