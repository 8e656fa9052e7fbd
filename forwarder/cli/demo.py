"""``forwarder demo``: the real master and workers between a built-in upstream and client.

Only the two ends are toys. Nothing is configured, and nothing is left behind.

Theory of operation::

    demo --+-- upstream    listens on 127.0.0.1:PORT+1; an HTTP page, or an echo
           +-- master      listens on 127.0.0.1:PORT; has the workers, and a guard
           +-- client      pushes data through and reads the echo

Every process but the demo holds the read end of one pipe, the lifeline, and only the demo holds its
write end. Nothing is ever written: end of file means stop, and the kernel says so even when the
demo was killed. A master knows of no lifeline, so its guard turns the end of file into a SIGINT.
Workers follow their master. The demo forks, so it has neither a thread nor an event loop.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import selectors
import signal
import socket
import sys
import time
from contextlib import closing, suppress
from enum import Enum
from typing import TYPE_CHECKING, Final, NoReturn

import click
import setproctitle

from forwarder.config.address import Address
from forwarder.config.model import Config, Rule, Settings, Upstream
from forwarder.errors import ExitCode, ForwarderError, Place, StartupError
from forwarder.master import Master
from forwarder.supervision.spec import MasterSpec
from forwarder.system import notify
from forwarder.system.signals import SignalQueue, describe_end

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"

_CLIENT_SESSIONS: Final = 8  # enough to reach most workers of a small machine; arbitrary
_BLOCK_BYTES: Final = 1024 * 1024  # per read and write of the two ends; 256 KiB gave less
_RETRY_S: Final = 0.1  # the client's rest before it replaces a lost session
_READY_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 10.0  # the master itself kills a worker that does not stop after 2 s
_MAX_REQUEST_BYTES: Final = 16 * 1024

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupted(Exception):  # noqa: N818 - an event, not a fault
    """A signal asked the demo to stop."""


class _ChildError(ForwarderError):
    """A process of the demo has ended by itself."""

    exit_code = ExitCode.INTERNAL


def run(*, workers: int, port: int, seconds: float | None) -> ExitCode:
    """Forward ``port`` to ``port`` + 1 and report, until interrupted or for ``seconds``.

    Raises StartupError when one of the ports is taken. Blocks until all its processes are gone.
    """
    listen, upstream = Address(HOST, port), Address(HOST, port + 1)
    counters = _Counters()
    with closing(_Family()) as family:
        try:
            with _listen(upstream) as listener:
                family.fork(
                    "upstream", lambda lifeline: _Upstream(listener, lifeline, counters).run()
                )
            _start_master(family, listen, upstream, workers)
            family.fork("client", lambda lifeline: _Client(listen, lifeline).run())
            _say_what_to_try(listen, upstream, workers)
            _report(family, counters, seconds)
        except _Interrupted:
            pass
    return ExitCode.OK


def _listen(address: Address) -> socket.socket:
    try:
        return socket.create_server((address.host, address.port), backlog=1024)
    except OSError as err:
        raise StartupError(
            f"--port: the demo's upstream cannot listen on {address}: {os.strerror(err.errno or 0)}"
            "; hint: does another demo run? --port takes another pair of ports"
        ) from err


def _say_what_to_try(listen: Address, upstream: Address, workers: int) -> None:
    count = f"{workers} worker" + ("s" if workers > 1 else "")
    click.echo(f"{listen} goes to {upstream} with {count}. Ctrl-C ends it. Try meanwhile:")
    click.echo(f"  curl http://{listen}/     (a page)")
    click.echo(f"  nc {listen.host} {listen.port}            (an echo)")


def _report(family: _Family, counters: _Counters, seconds: float | None) -> None:
    """Print what went through, each second and at the end."""
    began = at = time.monotonic()
    end = float("inf") if seconds is None else began + seconds
    first = before = counters.read()
    try:
        while at < end:
            family.wait(min(at + 1.0, end))
            now, seen = time.monotonic(), counters.read()
            sessions = seen[_SESSIONS]
            click.echo(
                f"{now - began:6.1f} s {_rates(before, seen, now - at)}  {sessions} sessions"
            )
            at, before = now, seen
    finally:
        now = time.monotonic()
        click.echo(f"on average {_rates(first, counters.read(), now - began)}")


def _rates(before: tuple[int, ...], after: tuple[int, ...], elapsed_s: float) -> str:
    to_upstream, to_client = (
        (after[way] - before[way]) * 8 / 1e9 / max(elapsed_s, 1e-6)
        for way in (_TO_UPSTREAM, _TO_CLIENT)
    )
    return f"to upstream {to_upstream:6.2f} Gbit/s  to client {to_client:6.2f} Gbit/s"


# -- processes


class _Family:
    """The demo's children. Owns the lifeline; closing it ends them all."""

    def __init__(self) -> None:
        self._signals = SignalQueue((*_STOP_SIGNALS, signal.SIGCHLD))
        self._lifeline, self._hold = os.pipe()
        self._children: dict[int, str] = {}

    def fork(self, name: str, main: Callable[[int], ExitCode | None]) -> None:
        """Run ``main`` in a new process. It is given the lifeline, and ends it by returning."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._become(name, main)
        self._children[pid] = name

    def wait(self, until: float, sock: socket.socket | None = None) -> bool:
        """Wait until a monotonic instant, or until ``sock`` can be read: that is True.

        Raises _Interrupted, and _ChildError when a child has ended.
        """
        watched: list[SignalQueue | socket.socket] = [self._signals]
        watched += [] if sock is None else [sock]
        while (patience := until - time.monotonic()) > 0:
            # Forever is not for select(2); an hour is the same to this loop.
            ready, _, _ = select.select(watched, [], [], min(patience, 3600.0))
            # What a child said comes before the news of its death.
            if sock in ready:
                return True
            if ready:
                self._hear()
        return False

    def close(self) -> None:
        """End all children and wait until they are gone; kill those that do not leave in time."""
        os.close(self._hold)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        self._collect()
        while self._children and (patience := deadline - time.monotonic()) > 0:
            select.select([self._signals], [], [], patience)
            self._signals.take()
            self._collect()
        for pid, name in self._children.items():
            log.error("demo: %s pid=%d does not stop, killing it", name, pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(self._lifeline)
        self._signals.close()

    def _become(self, name: str, main: Callable[[int], ExitCode | None]) -> NoReturn:
        status = ExitCode.INTERNAL
        try:
            # A terminal sends Ctrl-C to all; this process leaves when the demo does.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
            self._signals.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
            os.close(self._hold)
            setproctitle.setproctitle(f"forwarder: demo {name}")
            status = main(self._lifeline) or ExitCode.OK
        except BaseException:  # the process ends here, whatever it was
            log.exception("demo: %s has failed", name)
        finally:
            logging.shutdown()
            os._exit(status)

    def _hear(self) -> None:
        # Ctrl-C reaches the children too, so it comes before the news of their deaths.
        if any(number in _STOP_SIGNALS for number in self._signals.take()):
            raise _Interrupted
        for name, how in self._collect():
            raise _ChildError(f"the {name} of the demo has ended by itself: {how}")

    def _collect(self) -> list[tuple[str, str]]:
        """Reap. Returns name and end of each child that has gone."""
        gone = []
        for pid in tuple(self._children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                gone.append((self._children.pop(pid), describe_end(status)))
        return gone


def _start_master(family: _Family, listen: Address, upstream: Address, workers: int) -> None:
    """Start the forwarder and wait until it serves. Raises StartupError."""
    rule = Rule(name="demo", listen=listen, upstreams=(Upstream(upstream),), place=Place("--port"))
    spec = MasterSpec(
        config=Config(rules=(rule,), settings=Settings(workers=workers)), title="demo"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind("")  # the kernel picks an abstract name: unix(7), autobind
        name = "@" + told.getsockname()[1:].decode()
        family.fork("master", lambda lifeline: _run_master(spec, lifeline, told, name))
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while family.wait(deadline, told):
            fields = dict(line.split("=", 1) for line in told.recv(4096).decode().splitlines())
            if "EXIT_STATUS" in fields:
                raise StartupError(fields["STATUS"], ExitCode(int(fields["EXIT_STATUS"])))
            if "READY" in fields:
                return
    raise StartupError("the workers of the demo do not become ready", ExitCode.INTERNAL)


def _run_master(
    spec: MasterSpec, lifeline: int, told: socket.socket, notify_socket: str
) -> ExitCode:
    """In the master's process: guard it, run it, and report to the demo why it could not start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the master handles it
    told.close()
    os.environ["NOTIFY_SOCKET"] = notify_socket
    master = os.getpid()
    if os.fork() == 0:
        _guard(lifeline, master)
    os.close(lifeline)
    try:
        return Master(spec).run()
    except ForwarderError as err:
        notify.notify(f"STATUS={err}", f"EXIT_STATUS={err.exit_code:d}")
        return err.exit_code


def _guard(lifeline: int, master: int) -> NoReturn:
    """Wait for the end of the demo, then stop the master if it is still there."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        setproctitle.setproctitle("forwarder: demo guard")
        os.read(lifeline, 1)
        if os.getppid() == master:
            os.kill(master, signal.SIGINT)
    finally:
        os._exit(0)


# -- the upstream

_TO_UPSTREAM, _TO_CLIENT, _SESSIONS = range(3)


class _Counters:
    """Three numbers in shared memory: the upstream writes them, the demo reads them."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, 3 * 8)).cast("Q")

    def add(self, which: int, amount: int) -> None:
        """Change one of them; only one process may."""
        self._cells[which] += amount

    def read(self) -> tuple[int, ...]:
        """Bytes received and sent, and sessions now open."""
        return tuple(self._cells)


class _Talk(Enum):
    """UNDECIDED -> ECHO, or UNDECIDED -> ANSWERED: the first bytes decide."""

    UNDECIDED = "undecided"
    ECHO = "echo"
    ANSWERED = "answered"


class _Upstream:
    """``GET `` is answered with a page, anything else is sent back as it comes."""

    def __init__(self, listener: socket.socket, lifeline: int, counters: _Counters) -> None:
        listener.setblocking(False)
        self.counters = counters
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.selector.register(lifeline, selectors.EVENT_READ, None)
        self.scratch = memoryview(bytearray(_BLOCK_BYTES))
        self._listener = listener

    def run(self) -> None:
        """Serve until the lifeline ends."""
        while True:
            for key, _ in self.selector.select():
                if key.data is None:
                    return
                key.data()

    def _accept(self) -> None:
        # Whatever the error, the next turn tries again.
        with suppress(OSError):
            sock, _ = self._listener.accept()
            _Session(self, sock)


class _Session:
    """One session of the upstream. Owns its socket. Reads only when nothing waits to be sent."""

    def __init__(self, upstream: _Upstream, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._upstream = upstream
        self._sock = sock
        self._talk = _Talk.UNDECIDED
        self._head = b""
        self._unsent = memoryview(b"")
        upstream.selector.register(sock, selectors.EVENT_READ, self._on_event)
        upstream.counters.add(_SESSIONS, 1)

    def _on_event(self) -> None:
        try:
            if self._unsent:
                self._send_rest()
            else:
                self._receive()
        except BlockingIOError:
            pass
        except OSError:
            self._close()

    def _receive(self) -> None:
        scratch = self._upstream.scratch
        count = self._sock.recv_into(scratch)
        self._upstream.counters.add(_TO_UPSTREAM, count)
        if self._talk is _Talk.ECHO:
            self._send(scratch[:count])
        elif self._talk is _Talk.UNDECIDED:
            self._decide(bytes(scratch[:count]))
        if not count:
            self._close()

    def _decide(self, data: bytes) -> None:
        """Look at the first bytes; ``data`` is empty at the end of the stream."""
        self._head += data
        head, is_all = self._head, not data or len(self._head) > _MAX_REQUEST_BYTES
        if head.startswith(b"GET "):
            if is_all or b"\r\n\r\n" in head or b"\n\n" in head:
                self._talk = _Talk.ANSWERED
                self._send(memoryview(self._page()))
                # Closing now could reset the answer away: RFC 9293 3.6.1. Wait for the client.
                self._sock.shutdown(socket.SHUT_WR)
        elif is_all or not b"GET ".startswith(head):
            self._talk = _Talk.ECHO
            self._send(memoryview(head))

    def _page(self) -> bytes:
        to_upstream, to_client, sessions = self._upstream.counters.read()
        text = (
            "This page came through the forwarder.\n"
            f"So far it carried {to_upstream + to_client:,} bytes; {sessions} sessions are open.\n"
        )
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n"
            f"Content-Length: {len(text)}\r\n\r\n"
        )
        return (head + text).encode()

    def _send(self, data: memoryview) -> None:
        """Send what fits, keep a copy of the rest."""
        sent = self._try_send(data)
        if sent < len(data):
            self._unsent = memoryview(bytes(data[sent:]))
            self._watch(selectors.EVENT_WRITE)

    def _send_rest(self) -> None:
        self._unsent = self._unsent[self._try_send(self._unsent) :]
        if not self._unsent:
            self._watch(selectors.EVENT_READ)

    def _try_send(self, data: memoryview) -> int:
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            return 0
        self._upstream.counters.add(_TO_CLIENT, sent)
        return sent

    def _watch(self, events: int) -> None:
        self._upstream.selector.modify(self._sock, events, self._on_event)

    def _close(self) -> None:
        self._upstream.selector.unregister(self._sock)
        self._sock.close()
        self._upstream.counters.add(_SESSIONS, -1)


# -- the client


class _Client:
    """Keeps some sessions full in both directions, and replaces those that are lost."""

    def __init__(self, target: Address, lifeline: int) -> None:
        self._target = target
        self._lifeline = lifeline
        self._sessions: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(lifeline, selectors.EVENT_READ)
        self._block = b"forwarder demo\n" * (_BLOCK_BYTES // 15)
        self._scratch = bytearray(_BLOCK_BYTES)
        # Linux drops what is received instead of copying it: tcp(7), MSG_TRUNC.
        self._flags = socket.MSG_TRUNC if sys.platform.startswith("linux") else 0

    def run(self) -> None:
        """Push until the lifeline ends."""
        retry_at = 0.0
        while True:
            missing = _CLIENT_SESSIONS - len(self._sessions)
            if missing and time.monotonic() >= retry_at:
                retry_at = time.monotonic() + _RETRY_S
                for _ in range(missing):
                    self._open()
            for key, mask in self._selector.select(_RETRY_S):
                if key.fd == self._lifeline:
                    return
                if isinstance(key.fileobj, socket.socket):
                    self._serve(key.fileobj, mask)

    def _open(self) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.connect_ex((self._target.host, self._target.port))  # a refusal shows at the first use
        self._sessions.add(sock)
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _serve(self, sock: socket.socket, mask: int) -> None:
        is_lost = False
        try:
            if mask & selectors.EVENT_READ:
                is_lost = not sock.recv_into(self._scratch, 0, self._flags)
            if mask & selectors.EVENT_WRITE and not is_lost:
                sock.send(self._block)
        except BlockingIOError:
            pass
        except OSError:
            is_lost = True
        if is_lost:
            self._selector.unregister(sock)
            self._sessions.discard(sock)
            sock.close()
