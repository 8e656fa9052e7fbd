"""SIGHUP: nobody is dropped, all of a configuration comes into force or nothing of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from support import procfs
from support.configured import IS_SOAK, Configured, many_rules, rule
from support.ends import Link, accept, carry, connect, listen
from support.forwarder import Leaks, reserve_port
from support.loads import Load
from support.processes import as_nobody, listeners, members, state
from support.waiting import eventually

from forwarder.net import sockets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from process.conftest import Launch, Serve

pytestmark = pytest.mark.process

Address = tuple[str, int]


class Configure(Protocol):
    """See :func:`configure`."""

    def __call__(self, text: str, *arguments: str, prefix: Sequence[str] = ()) -> Configured:
        """Start a forwarder with this configuration."""


@pytest.fixture
def configure(launch: Launch, tmp_path: Path) -> Configure:
    """Start a forwarder with a configuration file, two workers unless the arguments say other."""

    def start(text: str, *arguments: str, prefix: Sequence[str] = ()) -> Configured:
        path = tmp_path / "forwarder.toml"
        path.write_text(text)
        forwarder = launch("-c", str(path), *(arguments or ("--workers", "2")), prefix=prefix)
        return Configured(forwarder, path)

    return start


class Ends:
    """Addresses to listen on, upstreams, and sessions between them; all closed at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def address(self, host: str = "127.0.0.1") -> Address:
        """An address for a rule, whose port nobody else gets."""
        found = self._stack.enter_context(reserve_port(host)).getsockname()
        return (found[0], found[1])

    def upstream(self) -> socket.socket:
        """A listener to forward to."""
        return self._stack.enter_context(listen())

    def link(self, address: Address, upstream: socket.socket) -> Link:
        """A session."""
        client = self._stack.enter_context(connect(address))
        return Link(client, self._stack.enter_context(accept(upstream)))


@pytest.fixture
def ends() -> Iterator[Ends]:
    """See :class:`Ends`."""
    with ExitStack() as stack:
        yield Ends(stack)


def assert_alive(link: Link) -> None:
    carry(link.client, link.upstream, b"x" * 10_000)
    carry(link.upstream, link.client, b"y" * 10_000)


def wait_closed(address: Address) -> None:
    eventually(lambda: listeners(address) == 0, lambda: f"{listeners(address)} sockets listen")


def assert_not_listening(address: Address) -> None:
    assert listeners(address) == 0
    with pytest.raises(ConnectionRefusedError):
        connect(address)


# -- nobody is dropped


def test_hundreds_of_reloads_drop_nobody_and_leave_nothing(
    configure: Configure, ends: Ends
) -> None:
    """Other rules come, go and change around a rule under load.

    Result: all its clients served, streams whole, the same workers, no descriptor and no memory
    more than before, and every reload reported.
    """
    count = 1000 if IS_SOAK else 60
    one, two, three, upstream = ends.address(), ends.address(), ends.address(), ends.upstream()
    to, elsewhere = upstream.getsockname(), ("127.0.0.1", 1)
    loaded = rule(one, to)
    texts = (
        rule(two, to) + loaded,
        loaded + rule(two, elsewhere) + rule(three, to),
        rule(three, to, 'rules = [{ type = "deny", pattern = "10.*" }]') + loaded,
        loaded,
    )
    plans = ("+1 -0 ~0 =1", "+1 -0 ~1 =1", "+0 -1 ~1 =1", "+0 -1 ~0 =1")
    it = configure(loaded)
    master = it.forwarder.pid
    workers = it.forwarder.workers()

    def under_load(reloads: int) -> None:
        before = len(it.outcomes())
        with Load(one, upstream, streams=20) as load:
            for i in range(reloads):
                outcome = it.reload(texts[i % 4])
                assert f"{plans[i % 4]} rules, generation {before + i + 2}" in outcome
            load.wait_served(100)
            account = load.stop()
        assert account.dropped == 0, account
        assert account.stream_bytes
        wait_closed(two)
        wait_closed(three)

    under_load(40)
    leaks = Leaks(it.forwarder)
    fds = len(procfs.descriptors(master))
    memory = {pid: procfs.resident_kib(pid) for pid in (master, *workers)}
    under_load(count)
    eventually(lambda: it.forwarder.workers() == workers)  # and the reader has gone
    leaks.check()
    assert len(procfs.descriptors(master)) == fds
    grown = {pid: procfs.resident_kib(pid) - kib for pid, kib in memory.items()}
    assert max(grown.values()) < 3072, grown
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


def test_a_changed_rule_leads_new_sessions_elsewhere_and_leaves_the_others(
    configure: Configure, ends: Ends
) -> None:
    one, old, new = ends.address(), ends.upstream(), ends.upstream()
    it = configure(rule(one, old.getsockname()))
    links = [ends.link(one, old) for _ in range(6)]
    assert "+0 -0 ~1 =0 rules, generation 2" in it.reload(rule(one, new.getsockname()))
    links += [ends.link(one, new) for _ in range(20)]
    for link in links:
        assert_alive(link)
    old.settimeout(0.1)
    with pytest.raises(TimeoutError):
        accept(old)


def test_a_renamed_rule_keeps_its_socket(configure: Configure, ends: Ends) -> None:
    """It is another rule then, but the same address. Result: nobody is refused."""
    one, upstream = ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to))
    with Load(one, upstream, streams=4) as load:
        for i in range(10):
            it.reload(rule(one, to, f'name = "name {i}"'))
        load.wait_served(100)
        account = load.stop()
    assert account.dropped == 0, account


def test_a_changed_access_list_is_for_new_sessions(configure: Configure, ends: Ends) -> None:
    one, upstream = ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to))
    link = ends.link(one, upstream)
    everyone = '[[global_rules]]\ntype = "deny"\npattern = "127.*"\n'
    for text in (
        rule(one, to, 'rules = [{ type = "deny", pattern = "127.*" }]'),
        everyone + rule(one, to),
    ):
        assert "~1 =0" in it.reload(text)
        for _ in range(10):
            with suppress(ConnectionResetError), connect(one) as client:
                assert client.recv(1) == b""
        assert_alive(link)
        it.reload(rule(one, to))
        for _ in range(10):
            assert_alive(ends.link(one, upstream))


def test_sessions_of_a_removed_rule_go_on_and_its_port_is_free(
    configure: Configure, ends: Ends
) -> None:
    one, two, upstream = ends.address(), ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to) + rule(two, to))
    links = [ends.link(two, upstream) for _ in range(6)]
    assert "+0 -1 ~0 =1" in it.reload(rule(one, to))
    wait_closed(two)
    assert_not_listening(two)
    for link in links:
        assert_alive(link)
    assert_alive(ends.link(one, upstream))


def test_clients_of_a_rule_that_goes_are_served_or_refused_and_never_reset(
    configure: Configure, ends: Ends
) -> None:
    """Many connect while the rule is removed. Result: nobody who was let in is dropped."""
    one, two, upstream = ends.address(), ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to) + rule(two, to))
    for _ in range(20 if IS_SOAK else 3):
        with Load(two, upstream, rate=1500) as load:
            load.wait_served(300)
            it.reload(rule(one, to))
            wait_closed(two)
            account = load.stop()
        assert account.refused > 0
        assert account.dropped == account.refused, account
        it.reload(rule(one, to) + rule(two, to))


def test_a_rule_that_comes_back_while_it_is_being_closed_refuses_nobody(
    configure: Configure, ends: Ends
) -> None:
    one, two, upstream = ends.address(), ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to) + rule(two, to))
    with Load(two, upstream, rate=500, streams=4) as load:
        for _ in range(50 if IS_SOAK else 5):
            it.reload(rule(one, to))
            it.reload(rule(one, to) + rule(two, to))
            load.wait_served(100)
        account = load.stop()
    assert account.dropped == (0 if drops_syn() else account.refused), account


def drops_syn() -> bool:
    """Whether we can have clients wait: without CAP_NET_ADMIN Linux 6.18 has them refused."""
    with socket.socket() as sock:
        return sockets.drop_syn(sock)


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::", "0.0.0.0"), ("0.0.0.0", "::")],
)
def test_a_rule_can_move_between_an_address_and_the_wildcard(
    configure: Configure, ends: Ends, before: str, after: str
) -> None:
    """Its own old sockets are not another program's. Result: in force, old sessions go on."""
    port, upstream = ends.address("::")[1], ends.upstream()
    to = upstream.getsockname()
    it = configure(rule((before, port), to))
    link = ends.link(("127.0.0.1", port), upstream)
    assert "master.reloaded +1 -1" in it.reload(rule((after, port), to))
    assert_alive(link)
    for _ in range(5):
        assert_alive(ends.link(("127.0.0.1", port), upstream))


def test_a_wildcard_rule_for_ipv4_can_be_added_beside_the_one_for_both(
    configure: Configure, ends: Ends
) -> None:
    port, six, four = ends.address("::")[1], ends.upstream(), ends.upstream()
    text = rule(("::", port), six.getsockname())
    it = configure(text)
    assert_alive(ends.link(("127.0.0.1", port), six))
    assert "master.reloaded" in it.reload(text + rule(("0.0.0.0", port), four.getsockname()))
    assert_alive(ends.link(("127.0.0.1", port), four))
    assert_alive(ends.link(("::1", port), six))


def test_of_many_reloads_at_once_the_last_wins(configure: Configure, ends: Ends) -> None:
    one, upstreams = ends.address(), [ends.upstream() for _ in range(3)]
    it = configure(rule(one, upstreams[0].getsockname()))
    link = ends.link(one, upstreams[0])
    for i in range(60):
        # By rename, so that no reload sees half a file.
        new = it.path.with_suffix(".new")
        new.write_text(rule(one, upstreams[1 + i % 2].getsockname()))
        new.rename(it.path)
        it.forwarder.signal(signal.SIGHUP)
    last = upstreams[1 + 59 % 2].getsockname()
    other = upstreams[1 + 58 % 2]

    def leads_to_the_last() -> bool:
        with connect(one) as client:
            client.sendall(b"?")
            last_one = next(up for up in upstreams if up.getsockname() == last)
            last_one.settimeout(0.5)
            other.settimeout(0.01)
            with suppress(TimeoutError):
                accept(other).close()
                return False
            with suppress(TimeoutError):
                accept(last_one).close()
                return True
        return False

    eventually(leads_to_the_last)
    assert len(it.outcomes()) < 60
    assert_alive(link)
    assert not it.forwarder.trouble()


# -- a configuration that cannot be used changes nothing


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("listen = [", r"forwarder\.toml:\d+: not valid TOML"),
        (
            '[[forwarding_rules]]\nlisten = "127.0.0.1:1"\nupstream = "a:1"\nno_such = 1\n',
            "no_such",
        ),
        (rule(("192.0.2.1", 1), ("127.0.0.1", 1)), "has no such address|not available"),
        (rule(("127.0.0.1", 1), ("127.0.0.1", 1), 'protocol = "UDP"'), r"toml:\d+.*(?i:udp)"),
        ("workers = 0\n", r"toml:\d+.*workers"),
        ("name\0", "NUL"),
    ],
    ids=["syntax", "key", "address", "protocol", "workers", "nul"],
)
def test_a_bad_file_changes_nothing_and_the_message_says_where(
    configure: Configure, ends: Ends, broken: str, message: str
) -> None:
    """A good rule is added beside the bad part. Result: it does not come into force either."""
    one, two, upstream = ends.address(), ends.address(), ends.upstream()
    to = upstream.getsockname()
    text = rule(one, to)
    it = configure(text)
    workers = it.forwarder.workers()
    link = ends.link(one, upstream)
    fds = len(procfs.descriptors(it.forwarder.pid))
    other_text = rule(two, to) + rule(one, ("127.0.0.1", 1))
    # Settings come before the first rule.
    is_setting = broken.startswith("workers")
    bad = broken + other_text if is_setting else other_text + broken
    assert "generation 1 stays in force" in it.reload(bad)
    rejected = [line for line in it.forwarder.lines if "reload.rejected" in line]
    assert any(re.search(message, line) for line in rejected), rejected
    assert_not_listening(two)
    assert_alive(link)
    assert_alive(ends.link(one, upstream))
    eventually(lambda: it.forwarder.workers() == workers)  # and the reader has gone
    # Fewer: it was just telling that it is ready when they were counted.
    assert len(procfs.descriptors(it.forwarder.pid)) <= fds
    assert "+1 -0 ~0 =1 rules, generation 2" in it.reload(text + rule(two, to))
    assert_alive(ends.link(two, upstream))


def test_an_address_in_use_changes_nothing(configure: Configure, ends: Ends) -> None:
    """New rules before and after it, one rule gone. Result: none of that is in force."""
    one, two, three, four, upstream = (
        *(ends.address() for _ in range(4)),
        ends.upstream(),
    )
    to, taken = upstream.getsockname(), ends.upstream().getsockname()
    it = configure(rule(one, to) + rule(four, to))
    assert_alive(ends.link(one, upstream))
    fds = len(procfs.descriptors(it.forwarder.pid))
    text = rule(two, to) + rule(one, to) + rule(taken, to) + rule(three, to)
    for _ in range(3):
        assert "generation 1 stays in force" in it.reload(text)
    (line, *_) = (line for line in it.forwarder.lines if "reload.rejected" in line)
    assert f"forwarder.toml:9:1: rule 'tcp {taken[0]}:{taken[1]}'" in line
    assert "Address already in use" in line
    assert_not_listening(two)
    assert_not_listening(three)
    for address in (one, four):
        for _ in range(6):
            assert_alive(ends.link(address, upstream))
    # Fewer: it was just telling that it is ready when they were counted.
    assert len(procfs.descriptors(it.forwarder.pid)) <= fds


@pytest.mark.parametrize("what", ["deleted", "empty", "directory", "pipe"])
def test_without_a_file_the_old_configuration_stays(
    configure: Configure, ends: Ends, what: str
) -> None:
    one, upstream = ends.address(), ends.upstream()
    text = rule(one, upstream.getsockname())
    it = configure(text)
    it.path.unlink()
    if what == "empty":
        it.path.touch()
    elif what == "directory":
        it.path.mkdir()
    elif what == "pipe":
        os.mkfifo(it.path)
    assert "generation 1 stays in force" in it.reload_as_it_is()
    assert any(
        re.search(r"rejected .*forwarder\.toml.*(exist|empty|directory|regular)", line)
        for line in it.forwarder.lines
    ), it.forwarder.lines
    assert_alive(ends.link(one, upstream))
    if what == "directory":
        it.path.rmdir()
    else:
        it.path.unlink(missing_ok=True)
    assert "generation 2" in it.reload(text)


def test_a_file_that_must_not_be_read_changes_nothing(
    launch: Launch, ends: Ends, public_path: Path
) -> None:
    one, upstream = ends.address(), ends.upstream()
    path = public_path / "forwarder.toml"
    path.write_text(rule(one, upstream.getsockname()))
    path.chmod(0o644)
    it = Configured(launch("-c", str(path), "--workers", "1", prefix=as_nobody()), path)
    path.chmod(0)
    assert "generation 1 stays in force" in it.reload_as_it_is()
    assert any("permission denied" in line for line in it.forwarder.lines)
    assert_alive(ends.link(one, upstream))


# -- while the file is being read


@contextmanager
def killed_at_the_end(*pids: int) -> Iterator[None]:
    """A process that is left holds the stderr that the fixtures read to its end."""
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_writing_to_a_pipe(pid: int) -> bool:
    """Whether a process sleeps because a pipe is full."""
    return "pipe_write" in Path(f"/proc/{pid}/wchan").read_text()


def test_clients_are_served_while_the_file_is_read(configure: Configure, ends: Ends) -> None:
    """The reading hangs, a worker dies meanwhile. Result: served, replaced, then in force."""
    one, two, upstream = ends.address(), ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to))
    loader = it.begin_slow_reload(rule(one, to) + rule(two, to))
    os.kill(it.forwarder.workers()[0], signal.SIGKILL)
    for _ in range(10):
        assert_alive(ends.link(one, upstream))
    it.forwarder.wait_logged("worker.died")
    assert "generation 2" in it.outcome_of(lambda: os.kill(loader, signal.SIGCONT))
    for _ in range(10):
        assert_alive(ends.link(two, upstream))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_stop_while_the_file_is_read_leaves_nothing(
    configure: Configure, ends: Ends, number: signal.Signals
) -> None:
    """The process that reads would hang for ever. Result: status 0, it is gone too."""
    one, upstream = ends.address(), ends.upstream()
    text = rule(one, upstream.getsockname())
    it = configure(text)
    loader = it.begin_slow_reload(text + many_rules())
    pid = it.forwarder.pid
    with killed_at_the_end(loader):
        it.forwarder.signal(number)
        assert it.forwarder.process.wait(20) == 0
        eventually(lambda: not members(pid), lambda: f"left: {members(pid)}")
    it.forwarder.wait()


def test_a_configuration_that_is_read_too_late_is_not_begun_while_sessions_end(
    configure: Configure, ends: Ends
) -> None:
    """SIGTERM while the file is read; a session goes on. Result: nothing new listens."""
    one, two, upstream = ends.address(), ends.address(), ends.upstream()
    to = upstream.getsockname()
    it = configure(rule(one, to))
    link = ends.link(one, upstream)
    loader = it.begin_slow_reload(rule(one, to) + rule(two, to))
    it.forwarder.signal(signal.SIGTERM)
    it.forwarder.wait_logged("master.stopping how=drain")
    with suppress(ProcessLookupError):
        os.kill(loader, signal.SIGCONT)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert listeners(two) == 0, "listens, and nobody accepts"
        time.sleep(0.01)
    assert_alive(link)
    link.close()
    assert it.forwarder.wait() == 0


def test_the_death_of_the_reading_process_changes_nothing(configure: Configure, ends: Ends) -> None:
    """Killed, by the kernel out of memory perhaps, before it says anything."""
    one, upstream = ends.address(), ends.upstream()
    text = rule(one, upstream.getsockname())
    it = configure(text)
    loader = it.begin_slow_reload(text)
    assert "generation 1 stays" in it.outcome_of(lambda: os.kill(loader, signal.SIGKILL))
    assert_alive(ends.link(one, upstream))
    assert "generation 2" in it.reload(text)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_to_all_processes_of_that_name_leaves_the_reading_one_alone(
    configure: Configure, ends: Ends, number: signal.Signals
) -> None:
    """As ``killall -HUP`` sends it, the way to reload a rinetd."""
    one, upstream = ends.address(), ends.upstream()
    text = rule(one, upstream.getsockname())
    it = configure(text)
    loader = it.begin_slow_reload(text)
    os.kill(loader, number)
    assert "generation 2" in it.outcome_of(lambda: os.kill(loader, signal.SIGCONT))


def test_the_death_of_the_reading_process_amid_its_answer_changes_nothing(
    configure: Configure, ends: Ends
) -> None:
    """The master is suspended until the pipe is full, so the answer is cut off."""
    one, upstream = ends.address(), ends.upstream()
    text = rule(one, upstream.getsockname())
    it = configure(text)
    loader = it.begin_slow_reload(text + many_rules())
    it.forwarder.signal(signal.SIGSTOP)
    eventually(lambda: state(it.forwarder.pid) == "T")
    os.kill(loader, signal.SIGCONT)
    eventually(lambda: is_writing_to_a_pipe(loader))
    os.kill(loader, signal.SIGKILL)
    assert "generation 1 stays" in it.outcome_of(lambda: it.forwarder.signal(signal.SIGCONT))
    assert_alive(ends.link(one, upstream))
    assert "generation 2" in it.reload(text)


def test_workers_notice_the_death_of_the_master_while_the_file_is_read(
    configure: Configure, ends: Ends
) -> None:
    """The process that reads has no part of what binds workers to the master."""
    one, upstream = ends.address(), ends.upstream()
    text = rule(one, upstream.getsockname())
    it = configure(text)
    loader = it.begin_slow_reload(text)
    with killed_at_the_end(loader):
        workers = it.forwarder.workers()
        it.forwarder.process.kill()
        it.forwarder.process.wait()
        with killed_at_the_end(*workers):
            eventually(
                lambda: sum("worker.orphaned" in line for line in it.forwarder.lines) == 2,
                lambda: "\n".join(it.forwarder.lines),
            )
    it.forwarder.wait()


def test_every_reload_is_announced_and_ends_whatever_comes_of_it(
    launch: Launch, tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    """As Type=notify-reload of systemd wants it: RELOADING with a time, and READY."""
    path = tmp_path / "forwarder.toml"
    good = rule(address, upstream.getsockname())
    path.write_text(good)
    it = launch("-c", str(path))
    for text in (good, "bad", good):
        path.write_text(text)
        it.signal(signal.SIGHUP)
        it.wait_notified("RELOADING=1")
        it.wait_notified("READY=1")
    assert it.stop() == 0


def test_a_reload_that_is_not_possible_is_announced_too(serve: Serve) -> None:
    """Rules of the command line. Result: nobody waits for a reload that never begins."""
    service = serve()
    service.forwarder.signal(signal.SIGHUP)
    service.forwarder.wait_notified("RELOADING=1")
    service.forwarder.wait_notified("READY=1")
    assert service.stop() == 0
