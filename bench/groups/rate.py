"""New connections/s with eight servers, by turn and by least, against one server."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import Group, hosts
from bench.measures import CONN
from bench.peers import HOST, NGINX_HTTP_CONF, UPSTREAM_PORT, Peer, nginx_http_command
from bench.rounds import Part

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from bench.groups.contenders import Contender

HEADING: Final = "What choosing costs"
SERVERS: Final = 8
GROUPS: Final = {
    "one": Group(servers=hosts(1)),
    "turn": Group(servers=hosts(SERVERS)),
    "least": Group(servers=hosts(SERVERS), balance="least"),
}


def _http_command(directory: Path) -> list[str]:
    """The usual upstream, at every address of loopback."""
    listen = f"listen {HOST}:{UPSTREAM_PORT}"
    return nginx_http_command(directory, NGINX_HTTP_CONF.replace(listen, f"listen {UPSTREAM_PORT}"))


def _command(contender: Contender, group: Group, directory: Path) -> list[str]:
    contender.write(group, directory)
    return contender.command(directory)


def parts(every: Iterable[Contender], rounds: int, seconds: int) -> list[Part]:
    """For each program a part of its own; its first peer has one server."""
    measure = replace(CONN, upstream=_http_command)
    return [
        Part(
            contender.name,
            (measure,),
            tuple(
                Peer(
                    name=f"{contender.name}, {name}",
                    program=contender.program,
                    settings="",
                    command=partial(_command, contender, group),
                )
                for name, group in GROUPS.items()
            ),
            rounds,
            seconds,
        )
        for contender in every
    ]
