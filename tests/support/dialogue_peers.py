"""What well-known forwarders make of dialogues, and we: a table, for people.

``PYTHONPATH=.:tests .venv/bin/python -m support.dialogue_peers 300 1``: how many, and the seed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers import nginx_stream_module
from support.dialogue_routes import direct_routes, forwarder_site, open_route
from support.dialogue_runs import Failure, Judge, written_dialogues
from support.dialogues import Carrier
from support.ends import written
from support.processes import listeners
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from support.dialogue_driver import Route
    from support.dialogues import Dialogue

    Command = Callable[[Path, list[Route]], list[list[str]]]

_KINDS = {
    "tcp": (False, False),
    "unix-in": (True, False),
    "unix-out": (False, True),
    "unix": (True, True),
}
_HAPROXY = """\
global
    maxconn 2000
defaults
    mode tcp
    timeout connect 60s
    timeout client 1h
    timeout server 1h
    {more}
"""
_NGINX = """\
daemon off;
error_log stderr crit;
pid {directory}/nginx.pid;
worker_processes 2;
events {{ worker_connections 4000; }}
stream {{
    access_log off;
    proxy_timeout 1h;
    {more}
"""


def _haproxy(more: str) -> Command:
    def command(directory: Path, routes: list[Route]) -> list[list[str]]:
        text = _HAPROXY.format(more=more)
        for number, route in enumerate(routes):
            listen = written(route.address).replace("unix:", "unix@")
            upstream = written(route.upstream()).replace("unix:", "unix@")
            text += f"listen l{number}\n    bind {listen}\n    server s {upstream}\n"
        (directory / "haproxy.cfg").write_text(text)
        return [["haproxy", "-db", "-f", str(directory / "haproxy.cfg")]]

    return command


def _nginx(more: str) -> Command:
    def command(directory: Path, routes: list[Route]) -> list[list[str]]:
        # As root its workers would be another user, who may not connect to our unix sockets.
        text = "user root;\n" if os.geteuid() == 0 else ""
        text += nginx_stream_module() + _NGINX.format(directory=directory, more=more)
        for route in routes:
            shared = "" if isinstance(route.address, str) else " reuseport"
            text += f"server {{ listen {written(route.address)}{shared}; "
            text += f"proxy_pass {written(route.upstream())}; }}\n"
        conf = directory / "nginx.conf"
        conf.write_text(text + "}\n")
        return [["nginx", "-p", str(directory), "-e", "stderr", "-c", str(conf)]]

    return command


def _socat(_directory: Path, routes: list[Route]) -> list[list[str]]:
    return [
        [
            *("socat", "-t", "3600", "-b", "65536"),
            _socat_word("LISTEN", route.address) + ",fork",
            _socat_word("CONNECT", route.upstream()),
        ]
        for route in routes
    ]


def _socat_word(verb: str, address: tuple[str, int] | str) -> str:
    if isinstance(address, str):
        return f"UNIX-{verb}:{address}"
    host, port = address
    if verb == "LISTEN":
        return f"TCP4-LISTEN:{port},bind={host},reuseport,backlog=1024,nodelay"
    return f"TCP4:{host}:{port},nodelay"


PEERS: dict[str, Command] = {
    "haproxy": _haproxy("option splice-request\n    option splice-response"),
    "haproxy-copy": _haproxy(""),
    "nginx": _nginx(""),
    "socat": _socat,
}


@contextmanager
def peer_routes(directory: Path, name: str) -> Iterator[list[Route]]:
    """Run a peer that serves a route of each kind."""
    with ExitStack() as stack:
        carriers = [Carrier(f"{name}-{kind}", unix) for kind, unix in _KINDS.items()]
        routes = [open_route(stack, directory / one.name, one) for one in carriers]
        for words in PEERS[name](directory, routes):
            process = stack.enter_context(subprocess.Popen(words, stderr=subprocess.DEVNULL))
            stack.callback(process.terminate)
        eventually(lambda: all(_is_served(route) for route in routes), name)
        yield routes


def _is_served(route: Route) -> bool:
    if isinstance(route.address, str):
        return Path(route.address).exists()
    return listeners(route.address) > 0


def failures_of_all(dialogues: Sequence[Dialogue]) -> list[Failure]:
    """Hold each dialogue over every route of every carrier, ours last."""
    with ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        judge = Judge(stack.enter_context(direct_routes(folder())))
        routes: list[Route] = []
        for name in PEERS:
            routes += stack.enter_context(peer_routes(folder(), name))
        for relay in ("splice", "copy"):
            routes += stack.enter_context(forwarder_site(folder(), relay)).routes
        found = []
        for route in routes:
            failures = judge.failures([(dialogue, route) for dialogue in dialogues])
            sys.stdout.write(f"{route.carrier.name}: {len(failures)} of {len(dialogues)}\n")
            for said, count in Counter(
                re.sub(r"\d+", "N", one.said[0]) for one in failures
            ).items():
                sys.stdout.write(f"    {count} {said}\n")
            sys.stdout.flush()
            found += failures
        return found


if __name__ == "__main__":
    failures_of_all(written_dialogues(int(sys.argv[1]), seed=int(sys.argv[2])))
