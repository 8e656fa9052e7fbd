"""Who is compared, and how each is told to reload, to upgrade, and to have other workers."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import (
    HAPROXY_SESSIONS,
    PORT,
    SERVER_PORT,
    forwarder_command,
    haproxy_command,
    reload_haproxy,
)
from bench.instance import ANSWER_S, ask
from bench.peers import FD_LIMIT, HOST, NGINX_HEAD, nginx_stream_module
from bench.procs import PROC, BenchError, tree, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REFUSED_S: Final = 10.0  # what has not begun by then is refused
NGINX_WORKER: Final = "nginx: worker process"


class RefusedError(BenchError):
    """A program does not do what it was told."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A program. All that is done to it gets the process id of the master and the directory.

    ``upgrade`` and ``reload`` return when new clients get to what is new; ``resize`` likewise, and
    gets the number of workers, or threads. ``upgrade`` returns the new master. ``worker_title`` is
    how the command line of a worker begins; "": all processes but the master are workers.
    ``has_one``: its workers are threads of one process. ``daemon``: it goes into the background,
    its pid file is DIRECTORY/NAME.pid, and the command lines of its processes begin like this.
    """

    name: str
    program: str
    file: str
    config: Callable[[int, Path], str]
    command: Callable[[Path], list[str]]
    reload: Callable[[int, Path], None]
    resize: Callable[[int, Path, int], None]
    upgrade: Callable[[int, Path], int]
    worker_title: str
    has_one: bool = False
    daemon: str = ""

    def write(self, workers: int, directory: Path) -> None:
        """Write the configuration."""
        (directory / self.file).write_text(self.config(workers, directory))

    def is_worker(self, pid: int, master: int) -> bool:
        """Whether a process of the program is a worker, or an old one."""
        title = self.worker_title
        return command_line(pid).startswith(title) if title else pid != master


def command_line(pid: int) -> str:
    """What ``ps`` shows; "" when it has gone."""
    with suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def program_path(name: str) -> str:
    """Where a program is; its name if it is nowhere."""
    return shutil.which(name) or name


def _forwarder_config(workers: int, directory: Path) -> str:
    return f"""\
workers = {workers}
hang_timeout = 3
pid_file = "{directory}/forwarder.pid"
[[forwarding_rules]]
listen = "{HOST}:{PORT}"
upstream = "{HOST}:{SERVER_PORT}"
"""


def _reload_forwarder(_pid: int, directory: Path) -> None:
    ask(directory / "control.sock", "reload")


def _resize_forwarder(_pid: int, directory: Path, workers: int) -> None:
    ask(directory / "control.sock", "workers", count=str(workers))


def _upgrade_forwarder(_pid: int, directory: Path) -> int:
    ask(directory / "control.sock", "upgrade")
    return int((directory / "forwarder.pid").read_text())


def _haproxy_config(threads: int, directory: Path) -> str:
    return f"""\
global
    nbthread {threads}
    maxconn {HAPROXY_SESSIONS}
    stats socket {directory}/haproxy.sock mode 600 level admin expose-fd listeners
defaults
    mode tcp
    maxconn {HAPROXY_SESSIONS}
    timeout connect 3s
    timeout client 1h
    timeout server 1h
listen bench
    bind {HOST}:{PORT}
    server s {HOST}:{SERVER_PORT}
"""


def _resize_haproxy(pid: int, directory: Path, threads: int) -> None:
    (directory / "haproxy.cfg").write_text(_haproxy_config(threads, directory))
    reload_haproxy(pid, directory)


def _upgrade_haproxy(pid: int, directory: Path) -> int:
    """Its master executes itself at each reload."""
    reload_haproxy(pid, directory)
    return pid


def _nginx_config(workers: int, directory: Path) -> str:
    # In the foreground it takes itself for one that is being upgraded, and ignores USR2.
    head = NGINX_HEAD.format(directory=directory).replace("daemon off;", "daemon on;")
    return f"""\
{nginx_stream_module()}{head}worker_processes {workers};
events {{ worker_connections {FD_LIMIT - 100}; }}
stream {{
    access_log off;
    server {{
        listen {HOST}:{PORT} reuseport;
        proxy_pass {HOST}:{SERVER_PORT};
        proxy_connect_timeout 3s;
        proxy_timeout 1h;
    }}
}}
"""


def _fresh_nginx(master: int) -> set[int]:
    """Its workers that are not about to leave."""
    return {
        proc.pid
        for proc in tree(master)
        if (line := command_line(proc.pid)).startswith(NGINX_WORKER) and "shutting down" not in line
    }


def _reload_nginx(pid: int, _directory: Path) -> None:
    before = _fresh_nginx(pid)
    os.kill(pid, signal.SIGHUP)

    def is_new() -> bool:
        now = _fresh_nginx(pid)
        return bool(now) and not now & before

    wait_until(is_new, "new workers of nginx", ANSWER_S)


def _resize_nginx(pid: int, directory: Path, workers: int) -> None:
    (directory / "nginx.conf").write_text(_nginx_config(workers, directory))
    _reload_nginx(pid, directory)


def _upgrade_nginx(pid: int, directory: Path) -> int:
    """As its documentation says: USR2, then QUIT to the old master when the new one serves.

    It ignores USR2 while the master that it was upgraded from still lives. Raises RefusedError.
    """
    pid_file = directory / "nginx.pid"
    os.kill(pid, signal.SIGUSR2)

    def new_master() -> int:
        with suppress(OSError, ValueError):
            found = int(pid_file.read_text())
            return found if found != pid and _fresh_nginx(found) else 0
        return 0

    try:
        wait_until(lambda: new_master() != 0, "a new master of nginx", REFUSED_S)
    except BenchError as err:
        raise RefusedError(str(err)) from None
    new = new_master()
    os.kill(pid, signal.SIGQUIT)
    return new


def contenders(forwarder: list[str]) -> dict[str, Contender]:
    """All of them by name, in report order."""
    every = (
        Contender(
            "forwarder",
            forwarder[0],
            "forwarder.toml",
            _forwarder_config,
            partial(forwarder_command, forwarder),
            _reload_forwarder,
            _resize_forwarder,
            _upgrade_forwarder,
            "forwarder: worker",
        ),
        Contender(
            "haproxy",
            "haproxy",
            "haproxy.cfg",
            _haproxy_config,
            haproxy_command,
            reload_haproxy,
            _resize_haproxy,
            _upgrade_haproxy,
            "",
            has_one=True,
        ),
        Contender(
            "nginx",
            "nginx",
            "nginx.conf",
            _nginx_config,
            # It executes itself by the name that it was called by, without a look at PATH.
            lambda d: [
                program_path("nginx"),
                "-p",
                str(d),
                "-e",
                "stderr",
                "-c",
                f"{d}/nginx.conf",
            ],
            _reload_nginx,
            _resize_nginx,
            _upgrade_nginx,
            NGINX_WORKER,
            daemon="nginx: ",
        ),
    )
    return {one.name: one for one in every}
