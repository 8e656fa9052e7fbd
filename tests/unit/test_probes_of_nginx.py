"""Checks of kind ``http``, answered by nginx."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest
from support.forwarder import reserve_port
from support.probing import ask, check, target
from support.processes import listeners
from support.programs import debian
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG: Final = """\
daemon off;
worker_processes 1;
pid {path}/pid;
error_log {path}/errors info;
events {{ worker_connections 64; }}
http {{
    access_log {path}/access;
    client_body_temp_path {path};
    proxy_temp_path {path};
    fastcgi_temp_path {path};
    uwsgi_temp_path {path};
    scgi_temp_path {path};
    server {{
        listen {host}:{port};
        listen unix:{path}/s;
        location / {{ return 200 "{text}"; }}
        location /moved {{ return 301 /; }}
        location /primary {{ return 503; }}
        location /nothing {{ return 444; }}
    }}
}}
"""
# A check does not look at it, but reads it with the status: or its end would be a reset.
LONG: Final = "x" * 4000


@contextmanager
def nginx(path: Path) -> Iterator[tuple[str, int]]:
    """Run it; yields where it listens."""
    with reserve_port() as holder:
        host, port = holder.getsockname()
        (path / "conf").write_text(CONFIG.format(path=path, host=host, port=port, text=LONG))
        with subprocess.Popen(
            ["nginx", "-c", path / "conf", "-e", path / "errors"], stderr=subprocess.DEVNULL
        ) as process:
            try:
                eventually(lambda: bool(listeners((host, port))))
                yield host, port
            finally:
                process.terminate()


def agents_in(log: Path) -> list[str]:
    """Who has asked, as nginx has it."""
    return [line.rsplit('"', 2)[1] for line in log.read_text().splitlines()]


@debian("nginx")
@pytest.mark.parametrize("by", ["TCP", "unix"])
def test_nginx_is_asked(tmp_path: Path, by: str) -> None:
    with nginx(tmp_path) as address:
        where = target(address if by == "TCP" else f"{tmp_path}/s")
        found = {
            path: ask(check("http", path=path), where)[:2]
            for path in ("/", "/moved", "/primary", "/nothing")
        }
    assert found == {
        "/": (True, ""),
        "/moved": (False, "http 301"),
        "/primary": (False, "http 503"),
        "/nothing": (False, "closed without an answer"),
    }
    agents = ["forwarder"] * 4
    eventually(lambda: agents_in(tmp_path / "access") == agents)  # a line follows the answer
    errors = (tmp_path / "errors").read_text()
    assert "reset" not in errors, errors
