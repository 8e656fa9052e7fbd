"""The real command with a rule of every kind, what it holds, and what can be done to it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from support import procfs
from support.control import ask
from support.datagrams import free_udp_address
from support.forwarder import Forwarder, reserve_port
from support.processes import members
from support.waiting import eventually

from faults.cases import Doing
from faults.traffic import Answers, Places, echo

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

WORKERS: Final = 2
_BUGS: Final = re.compile(r"Traceback|\.bug|never retrieved|internal error|Exception|nonsense")
_WARNING: Final = re.compile(r" (?:WARNING|ERROR|CRITICAL) (.*)")


class Instance:
    """A forwarder in a directory of its own, with upstreams in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._holders: list[socket.socket] = []
        self._config = directory / "a.toml"
        self.control = directory / "control.sock"
        self.log = directory / "sessions.json"
        self._generations = 0

    async def start(self) -> None:
        """Upstreams, configuration, and the command."""
        loop = asyncio.get_running_loop()
        self._tcp = await asyncio.start_server(echo, "127.0.0.1", 0)
        self._udp, _ = await loop.create_datagram_endpoint(Answers, local_addr=("127.0.0.1", 0))
        self._holders = [reserve_port() for _ in range(3)]
        tcp, tcptoudp, more = (holder.getsockname() for holder in self._holders)
        self.places = Places(
            tcp, str(self._directory / "s"), free_udp_address(), free_udp_address(), tcptoudp
        )
        self._more = more
        self._write("")
        self.forwarder = await asyncio.to_thread(
            Forwarder, ["-c", str(self._config)], prefix=["setsid"]
        )
        self.workers = self.forwarder.workers()
        self.master = self.forwarder.pid

    def _write(self, more: str) -> None:
        to_tcp = "{}:{}".format(*self._tcp.sockets[0].getsockname())
        to_udp = "{}:{}".format(*self._udp.get_extra_info("sockname"))
        here = self.places
        rules = [
            ("tcp", "{}:{}".format(*here.tcp), to_tcp, ""),
            ("tcp", f"unix:{here.unix}", to_tcp, ""),
            ("udp", "{}:{}".format(*here.udp), to_udp, ""),
            ("udptotcp", "{}:{}".format(*here.udptotcp), to_tcp, 'framing = "length"\n'),
            ("tcptoudp", "{}:{}".format(*here.tcptoudp), to_udp, 'framing = "length"\n'),
        ]
        text = (
            f'workers = {WORKERS}\ncontrol = "{self.control}"\n'
            f'pid_file = "{self._directory / "pid"}"\n'
        )
        for protocol, listen, upstream, extra in rules:
            text += (
                f'[[forwarding_rules]]\nprotocol = "{protocol}"\nlisten = "{listen}"\n'
                f'upstream = "{upstream}"\ntimeout = 3\n{extra}'
                if "udp" in protocol
                else f'[[forwarding_rules]]\nlisten = "{listen}"\nupstream = "{upstream}"\n'
            )
        self._config.write_text(f'{text}{more}[[logs]]\nto = "{self.log}"\nformat = "json"\n')

    # -- what it does during a fault

    async def act(self, doing: Doing) -> None:
        """Do it; it may fail, but must have an outcome."""
        acts: dict[Doing, Callable[[], None]] = {
            Doing.LOAD: lambda: None,
            Doing.RELOAD: self._reload,
            Doing.UPGRADE: self._upgrade,
            Doing.RESIZE: self._resize,
            Doing.DEATH: self._kill_worker,
            Doing.STATUS: self._status,
            Doing.ROTATION: self._rotate,
        }
        await asyncio.to_thread(acts[doing])

    def _reload(self) -> None:
        """A rule comes."""
        self._write(
            '[[forwarding_rules]]\nlisten = "{}:{}"\nupstream = "127.0.0.1:1"\n'.format(*self._more)
        )
        before = self._said(r"master\.reloaded|stays in force")
        os.kill(self.master, signal.SIGHUP)
        with suppress(AssertionError):
            eventually(lambda: self._said(r"master\.reloaded|stays in force") > before, within_s=5)

    def _upgrade(self) -> None:
        with suppress(OSError, AssertionError, ValueError):
            ask(self.control, "upgrade")

    def _resize(self) -> None:
        for number in (signal.SIGTTIN, signal.SIGTTOU):
            os.kill(self.master, number)
            with suppress(AssertionError):
                eventually(lambda: False, within_s=1.5)

    def _kill_worker(self) -> None:
        os.kill(self.forwarder.workers()[0], signal.SIGKILL)
        with suppress(AssertionError):
            eventually(lambda: False, within_s=1.5)

    def _status(self) -> None:
        for op in ("status", "sessions", "status"):
            with suppress(OSError, AssertionError, ValueError):
                ask(self.control, op)

    def _rotate(self) -> None:
        if self.log.exists():
            self.log.rename(self.log.with_suffix(".1"))
        os.kill(self.master, signal.SIGUSR1)
        with suppress(AssertionError):
            eventually(lambda: False, within_s=1.0)

    # -- what is to be seen of it

    def _said(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.forwarder.lines)

    def held(self) -> dict[str, list[str]]:
        """What each process has open, but pipes: workers keep some for the next session."""
        now = self.processes()
        return {f"{role} {n}": procfs.without_pipes(pid) for n, (role, pid) in enumerate(now)}

    def processes(self) -> list[tuple[str, int]]:
        """The master and its workers."""
        master = self.current_master()
        return [("master", master), *(("worker", pid) for pid in procfs.children(master))]

    def current_master(self) -> int:
        """After an upgrade it is another one."""
        if self.forwarder.process.poll() is None:
            return self.master
        text = (self._directory / "pid").read_text().strip()
        return int(text)

    def warnings(self) -> list[str]:
        """What it has said, without numbers, each once."""
        found = (_WARNING.search(line) for line in self.forwarder.lines)
        texts = (re.sub(r"[0-9]+", "N", match[1]) for match in found if match)
        return list(dict.fromkeys(texts))

    def bugs(self) -> list[str]:
        """Lines that should never be."""
        return [line for line in self.forwarder.lines if _BUGS.search(line)]

    def deaths(self) -> int:
        """How many workers have died."""
        return self._said(r"worker\.died")

    async def stop(self) -> list[int]:
        """End it. Returns what is left of it, which is killed."""
        session = self.forwarder.pid
        with suppress(OSError, ValueError):
            os.kill(self.current_master(), signal.SIGTERM)
        with suppress(AssertionError):
            await asyncio.to_thread(eventually, lambda: not members(session), "", 20)
        left = members(session)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self.forwarder.wait)
        self._tcp.close()
        self._udp.close()
        for holder in self._holders:
            holder.close()
        return left
