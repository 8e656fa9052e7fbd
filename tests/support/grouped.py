"""A forwarder of one group of servers that say who they are, and sessions that know theirs."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from support.control import ask
from support.echo import Echo
from support.ends import connect
from support.forwarder import reserve_port
from support.processes import members, run_command
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from process.conftest import Launch

    from support.forwarder import Forwarder

GROUP = "pg"


class Client:
    """One open session, and the server that it is with."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.server = self.ask()

    def ask(self) -> str:
        """Say something; returns the name of the server that answers."""
        self.sock.sendall(b"hello")
        return self.sock.recv(1000).decode().partition(" ")[0]

    def is_cut(self) -> bool:
        """Whether it was reset, or ended, by now."""
        self.sock.setblocking(False)
        try:
            return not self.sock.recv(1000)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        finally:
            self.sock.setblocking(True)


class Grouped:
    """A rule that leads to a group of three servers, at one host by three ports."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self._launch = launch
        self._stack = stack
        self.config = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self.state = directory / "state.json"
        self.address: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        echo = stack.enter_context(Echo(tcp=[("127.0.0.1", 0)] * 3))
        self.servers = ["{}:{}".format(*address) for address in echo.tcp]
        self.forwarder: Forwarder

    def text(self, *, servers: Iterable[str] = (), more: str = "", head: str = "") -> str:
        """The configuration: ``head``, then the rule, and ``more`` keys of the group."""
        named = ", ".join(f'"{one}"' for one in servers or self.servers)
        host, port = self.address
        return (
            f'{head}\nworkers = 2\ncontrol = "{self.control}"\n'
            f'[[forwarding_rules]]\nname = "one"\nlisten = "{host}:{port}"\n'
            f'upstream = "group:{GROUP}"\n'
            f'[[groups]]\nname = "{GROUP}"\nservers = [{named}]\n{more}\n'
        )

    def start(self, *, prefix: Sequence[str] = (), **text: str) -> Forwarder:
        """Write the configuration, and start it; ``prefix`` as for launch."""
        self.config.write_text(self.text(**text))
        self.forwarder = self._launch("-c", str(self.config), prefix=prefix)
        return self.forwarder

    def start_udp(self, servers: Iterable[str]) -> Forwarder:
        """The same for UDP, with other servers."""
        text = self.text(servers=servers)
        self.config.write_text(text.replace("upstream =", 'protocol = "udp"\nupstream ='))
        self.forwarder = self._launch("-c", str(self.config))
        return self.forwarder

    def reload(self, text: str) -> None:
        """Write another configuration, and put it in force."""
        self.config.write_text(text)
        done = self.run("reload")
        assert done.returncode == 0, done.stderr

    def upgrade(self) -> int:
        """Upgrade; returns the pid of the new master."""
        done = self.run("upgrade")
        assert done.returncode == 0, done.stderr
        found = re.match(r"pid (\d+) serves", done.stdout)
        assert found is not None
        return int(found[1])

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command against it."""
        return run_command(*arguments, "--control", str(self.control))

    def order(self, *arguments: str) -> str:
        """Run ``forwarder upstream``, which has to work; returns what it prints."""
        done = self.run("upstream", *arguments)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def described(self) -> dict[str, dict[str, object]]:
        """The servers of the group as in the status, by name."""
        (group,) = [one for one in self._groups() if one["name"] == GROUP]
        servers = group["servers"]
        assert isinstance(servers, list)
        return {one["server"]: one for one in servers}

    def _groups(self) -> list[dict[str, object]]:
        found = ask(self.control, "upstreams")["groups"]
        assert isinstance(found, list)
        return found

    def session(self) -> Client:
        """Open a session."""
        return Client(self._stack.enter_context(connect(self.address)))

    def sessions_at(self, server: str, count: int) -> list[Client]:
        """Open sessions until one server has this many of them; returns those."""
        found: list[Client] = []
        while len(found) < count:
            client = self.session()
            if client.server == server:
                found.append(client)
            else:
                client.sock.close()
        return found

    def seen(self, count: int) -> set[str]:
        """The servers that so many new sessions get, which end at once."""
        found = set()
        for _ in range(count):
            client = self.session()
            client.sock.close()
            found.add(client.server)
        return found

    def logged(self, pattern: str) -> list[str]:
        """The lines of the log that ``pattern`` is found in."""
        return [line for line in self.forwarder.lines_so_far() if re.search(pattern, line)]

    def stop(self) -> None:
        """Stop the instance that has the control socket now, and wait until nothing is left."""
        with suppress(OSError):
            ask(self.control, "stop")
        pid = self.forwarder.pid
        eventually(lambda: not members(pid), lambda: f"left: {members(pid)}", within_s=60)
        self.forwarder.wait()


def kill(pid: int) -> None:
    """Kill a process without mercy."""
    os.kill(pid, signal.SIGKILL)
