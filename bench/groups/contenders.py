"""Who is compared, and how each is told of the same group, and to reload. Starts nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from bench.instance import ANSWER_S, ask
from bench.peers import FD_LIMIT, HOST, NGINX_HEAD, nginx_stream_module
from bench.procs import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PORT: Final = 9000  # of the program in the middle
SERVER_PORT: Final = 9001
CHECK_PORT: Final = 9002  # where a server is checked, if that is not where it serves
CONNECT_S: Final = 3  # of each attempt, in all programs alike
EVERY_S: Final = 2  # between checks; the default of HAProxy and of the forwarder
HAPROXY_SESSIONS: Final = 7000  # bounded by FD_LIMIT, see peers.py
RESENT_S: Final = 0.25  # longer than a reload of HAProxy takes when nothing else runs
STATE_FILE: Final = "state"  # of HAProxy
NO_RESOLVER: Final = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group as all programs understand it; balance is in the forwarder's words.

    ``max_sessions`` of each server, 0 for none; so many sessions wait in the forwarder, those of
    HAProxy always. ``check_port`` 0: not checked. ``workers`` are
    processes or threads. ``resets``: the sessions of a server that goes down are ended. ``zone``
    is nginx's memory for all workers. ``resolver``: the name server, where servers have names.
    """

    servers: tuple[str, ...]
    balance: str = "turn"
    max_sessions: int = 0
    max_queue: int = 0
    check_port: int = 0
    workers: int = 2
    resets: bool = False
    zone: bool = True
    resolver: str = NO_RESOLVER


@dataclass(frozen=True, slots=True)
class Contender:
    """A program: what its file is called and says, how it is started and told to reload.

    ``reload_and_wait`` gets the process id and the directory, and returns when the new
    configuration is in force. Raises BenchError when that takes too long.
    """

    name: str
    program: str
    file: str
    config: Callable[[Group, Path], str]
    command: Callable[[Path], list[str]]
    reload_and_wait: Callable[[int, Path], None]
    has_checks: bool = True

    def write(self, group: Group, directory: Path) -> None:
        """Write the configuration; what an earlier run has kept of servers is not for this one."""
        (directory / STATE_FILE).unlink(missing_ok=True)
        (directory / self.file).write_text(self.config(group, directory))


def hosts(count: int) -> tuple[str, ...]:
    """Addresses of servers: the loopback network, from 127.0.0.2 on; at most 65,000."""
    return tuple(f"127.0.{number // 250}.{number % 250 + 2}" for number in range(count))


def forwarder_config(group: Group, _directory: Path) -> str:
    """One rule with a group by name; with one server that is neither limited nor checked, plain."""
    text = f'workers = {group.workers}\nconnect_timeout = "{CONNECT_S}s"\n'
    text += f'[[forwarding_rules]]\nname = "bench"\nlisten = "{HOST}:{PORT}"\n'
    if len(group.servers) == 1 and not (group.max_sessions or group.check_port):
        return f'{text}upstream = "{group.servers[0]}:{SERVER_PORT}"\n'
    text += 'upstream = "group:bench"\n[[groups]]\nname = "bench"\n'
    limit = f", max_sessions = {group.max_sessions}" if group.max_sessions else ""
    servers = "".join(f'  {{ at = "{one}:{SERVER_PORT}"{limit} }},\n' for one in group.servers)
    text += f'balance = "{group.balance}"\nservers = [\n{servers}]\n'
    if group.max_queue:
        text += f"max_queue = {group.max_queue}\n"
    if group.resets:
        text += 'on_down = "reset"\n'
    if group.check_port:
        text += f'[groups.check]\nkind = "tcp"\nport = {group.check_port}\nevery = "{EVERY_S}s"\n'
    return text


HAPROXY_WORDS: Final = {"turn": "roundrobin", "least": "leastconn"}


def haproxy_config(group: Group, directory: Path, *, keeps_state: bool = False) -> str:
    """As its manual advises: a retry goes to another server; listeners survive a reload.

    ``keeps_state``: it reads the states of servers from a file when it starts.
    """
    state = ("", "")
    if keeps_state:
        state = (
            f"    server-state-file {directory}/{STATE_FILE}\n",
            "    load-server-state-from-file global\n",
        )
    server = f"inter {EVERY_S}s fall 3 rise 2"
    if group.check_port:
        server += f" check port {group.check_port}"
    if group.max_sessions:
        server += f" maxconn {group.max_sessions}"
    if group.resets:
        server += " on-marked-down shutdown-sessions"
    resolvers = ""
    if group.resolver:
        server += " resolvers names init-addr last,libc,none"
        resolvers = f"resolvers names\n    nameserver one {group.resolver}:53\n"
    servers = "".join(
        f"    server s{number} {host}:{SERVER_PORT}\n" for number, host in enumerate(group.servers)
    )
    return f"""\
global
    nbthread {group.workers}
    maxconn {HAPROXY_SESSIONS}
    stats socket {directory}/haproxy.sock mode 600 level admin expose-fd listeners
{state[0]}defaults
    mode tcp
{state[1]}    maxconn {HAPROXY_SESSIONS}
    timeout connect {CONNECT_S}s
    timeout queue {CONNECT_S}s
    timeout client 1h
    timeout server 1h
    retries 3
    option redispatch 1
{resolvers}listen bench
    bind {HOST}:{PORT}
    balance {HAPROXY_WORDS[group.balance]}
    default-server {server}
{servers}"""


def nginx_config(group: Group, directory: Path) -> str:
    """No checks: those are not in the free nginx. max_fails and fail_timeout as they are."""
    words = "        zone bench 1m;\n" if group.zone else ""
    words += "        least_conn;\n" if group.balance == "least" else ""
    limit = f" max_conns={group.max_sessions}" if group.max_sessions else ""
    words += "".join(f"        server {host}:{SERVER_PORT}{limit};\n" for host in group.servers)
    head = nginx_stream_module() + NGINX_HEAD.format(directory=directory)
    return f"""\
{head}worker_processes {group.workers};
events {{ worker_connections {FD_LIMIT - 100}; }}
stream {{
    access_log off;
    upstream bench {{
{words}    }}
    server {{
        listen {HOST}:{PORT} reuseport;
        proxy_pass bench;
        proxy_connect_timeout {CONNECT_S}s;
        proxy_timeout 1h;
    }}
}}
"""


def _reload_forwarder(directory: Path) -> None:
    ask(directory / "control.sock", "reload")


def _reload_haproxy_with_state(pid: int, directory: Path) -> None:
    """What it knows of servers is written to the file first, as its manual says."""
    (directory / STATE_FILE).write_text(_ask_haproxy(directory, "show servers state"))
    reload_haproxy(pid, directory)


def reload_haproxy(pid: int, directory: Path) -> None:
    """Another worker than before answers. A signal that comes amid a reload is lost: once more."""
    before = _haproxy_worker(directory)
    again_s = 0.0

    def is_new() -> bool:
        nonlocal again_s
        if time.monotonic() >= again_s:
            os.kill(pid, signal.SIGUSR2)
            again_s = time.monotonic() + RESENT_S
        return _haproxy_worker(directory) not in ("", before)

    wait_until(is_new, "a new worker", ANSWER_S)


def _haproxy_worker(directory: Path) -> str:
    """The process id of the worker that answers at the stats socket; "" if none does."""
    lines = _ask_haproxy(directory, "show info").splitlines()
    return next((line for line in lines if line.startswith("Pid:")), "")


def _ask_haproxy(directory: Path, what: str) -> str:
    """What it answers at its stats socket; "" if it does not."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        sock.connect(f"{directory}/haproxy.sock")
        sock.sendall(f"{what}\n".encode())
        with sock.makefile() as answer:
            return answer.read()
    return ""


def forwarder_command(forwarder: list[str], directory: Path) -> list[str]:
    """How ``forwarder``, a command, is started with the files of a directory."""
    control = f"{directory}/control.sock"
    return [*forwarder, "-c", f"{directory}/forwarder.toml", "--control", control]


def haproxy_command(directory: Path) -> list[str]:
    """How HAProxy is started with the files of a directory: as master and worker."""
    return ["haproxy", "-W", "-db", "-f", f"{directory}/haproxy.cfg"]


def contenders(forwarder: list[str]) -> dict[str, Contender]:
    """All of them by name, in report order."""
    every = (
        Contender(
            "forwarder",
            forwarder[0],
            "forwarder.toml",
            forwarder_config,
            partial(forwarder_command, forwarder),
            lambda _pid, d: _reload_forwarder(d),
        ),
        Contender(
            "haproxy",
            "haproxy",
            "haproxy.cfg",
            haproxy_config,
            haproxy_command,
            reload_haproxy,
        ),
        Contender(
            "haproxy-state",
            "haproxy",
            "haproxy.cfg",
            partial(haproxy_config, keeps_state=True),
            haproxy_command,
            _reload_haproxy_with_state,
        ),
        Contender(
            "nginx",
            "nginx",
            "nginx.conf",
            nginx_config,
            lambda d: ["nginx", "-p", str(d), "-e", "stderr", "-c", f"{d}/nginx.conf"],
            lambda pid, _d: os.kill(pid, signal.SIGHUP),
            has_checks=False,
        ),
    )
    return {one.name: one for one in every}
