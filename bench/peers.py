"""Who is measured: the forwarder and the programs it is compared with, at their best fair settings.

Each listens on 127.0.0.1:9000 and forwards to 127.0.0.1:9001. Starts nothing itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.procs import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOST = "127.0.0.1"
LISTEN_PORT = 9000
UPSTREAM_PORT = 9001

WORKERS = 2  # processes or threads of every peer that can have more than one
# Room for the idle measure and more. HAProxy asks for 2.5 descriptors for each (two sockets, and
# pipes for a quarter of them) and does not start without, so FD_LIMIT bounds it.
MAX_SESSIONS = 7000
FD_LIMIT = 20_000  # RLIMIT_NOFILE of every process; common as a hard limit in containers

HAPROXY_CONF = f"""\
global
    nbthread {WORKERS}
    maxconn {MAX_SESSIONS}
defaults
    mode tcp
    maxconn {MAX_SESSIONS}
    option splice-request
    option splice-response
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
listen bench
    bind {HOST}:{LISTEN_PORT}
    server upstream {HOST}:{UPSTREAM_PORT}
"""

NGINX_HEAD = """\
daemon off;
error_log stderr crit;
pid {directory}/nginx.pid;
"""

NGINX_STREAM_CONF = f"""\
worker_processes {WORKERS};
events {{ worker_connections {2 * MAX_SESSIONS}; }}
stream {{
    access_log off;
    proxy_timeout 1h;
    server {{
        listen {HOST}:{LISTEN_PORT} reuseport;
        proxy_pass {HOST}:{UPSTREAM_PORT};
    }}
    server {{
        listen {HOST}:{LISTEN_PORT} udp reuseport;
        proxy_pass {HOST}:{UPSTREAM_PORT};
    }}
}}
"""

# The same rule for TCP and for UDP, for iperf3 -u wants both.
FORWARDER_CONF = "".join(
    f"""\
[[forwarding_rules]]
listen = "{HOST}:{LISTEN_PORT}"
upstream = "{HOST}:{UPSTREAM_PORT}"
protocol = "{protocol}"
"""
    for protocol in ("tcp", "udp")
)

# The HTTP server behind every peer in the conn measure; the temp paths keep it out of the system's.
NGINX_HTTP_CONF = f"""\
worker_processes 1;
events {{ worker_connections {2 * MAX_SESSIONS}; }}
http {{
    access_log off;
    client_body_temp_path {{directory}}/body;
    proxy_temp_path {{directory}}/proxy;
    fastcgi_temp_path {{directory}}/fastcgi;
    uwsgi_temp_path {{directory}}/uwsgi;
    scgi_temp_path {{directory}}/scgi;
    server {{
        listen {HOST}:{UPSTREAM_PORT} backlog=4096;
        location / {{ return 200 "ok\\n"; }}
    }}
}}
"""


# Measured only when asked for by name: the forwarder beside itself, with limits far above the load.
ON_REQUEST = ("forwarder-limited", "forwarder-metered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One program under test.

    ``command`` writes what configuration it needs into a directory and returns the command line;
    None for ``direct``, where the load goes straight to the upstream. ``has_udp``: whether it
    forwards UDP on the same port, too.
    """

    name: str
    program: str
    settings: str
    version: tuple[str, ...] = ()
    command: Callable[[Path], list[str]] | None = None
    has_udp: bool = False


def rinetd_command(directory: Path) -> list[str]:
    """Write rinetd's configuration; the pid file would be in /run otherwise."""
    conf = directory / "rinetd.conf"
    rule = f"{HOST} {LISTEN_PORT} {HOST} {UPSTREAM_PORT}"
    conf.write_text(f"{rule}\npidlogfile {directory}/rinetd.pid\n")
    return ["rinetd", "-f", "-c", str(conf)]


def haproxy_command(directory: Path) -> list[str]:
    """Write HAProxy's configuration; -db keeps it in the foreground, one process."""
    conf = directory / "haproxy.cfg"
    conf.write_text(HAPROXY_CONF)
    return ["haproxy", "-db", "-f", str(conf)]


def nginx_stream_command(directory: Path) -> list[str]:
    """Write the configuration of nginx as a TCP proxy."""
    head = nginx_stream_module() + NGINX_HEAD.format(directory=directory)
    return _nginx(directory, "nginx-stream.conf", head + NGINX_STREAM_CONF)


def nginx_http_command(directory: Path) -> list[str]:
    """Write the configuration of nginx as the HTTP upstream."""
    text = NGINX_HEAD.format(directory=directory) + _fill(NGINX_HTTP_CONF, directory)
    return _nginx(directory, "nginx-http.conf", text)


def _fill(conf: str, directory: Path) -> str:
    # Not str.format: nginx has braces of its own.
    return conf.replace("{directory}", str(directory))


def _nginx(directory: Path, name: str, text: str) -> list[str]:
    conf = directory / name
    conf.write_text(text)
    return ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(conf)]


def nginx_stream_module() -> str:
    """Return the load_module line for the stream module, empty where it is built in."""
    flags = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=True).stderr
    if "--with-stream=dynamic" not in flags:
        return ""
    found = re.search(r"--modules-path=(\S+)", flags)
    if found is None:
        raise BenchError("nginx -V does not say where its modules are")
    return f"load_module {found[1]}/ngx_stream_module.so;\n"


def all_peers(forwarder: list[str]) -> dict[str, Peer]:
    """Return every peer by name, in report order. ``forwarder`` is the command that starts it."""
    splice = [*forwarder, "--workers", str(WORKERS)]
    copy = [*splice, "--relay", "copy"]
    version = (*forwarder, "--version")
    peers = (
        Peer(name="direct", program="", settings="no forwarder: client to upstream", has_udp=True),
        _forwarder("forwarder", splice, version),
        _forwarder("forwarder-copy", copy, version),
        _forwarder("forwarder-limited", splice, version, "max_sessions = 1_000_000\n"),
        _forwarder("forwarder-metered", splice, version, 'bandwidth = "1000Gbit"\n'),
        Peer(
            name="rinetd",
            program="rinetd",
            settings=f"rinetd -f, one rule: {HOST} {LISTEN_PORT} {HOST} {UPSTREAM_PORT}, no log",
            version=("rinetd", "--version"),
            command=rinetd_command,
        ),
        Peer(
            name="haproxy",
            program="haproxy",
            settings=HAPROXY_CONF,
            version=("haproxy", "-v"),
            command=haproxy_command,
        ),
        Peer(
            name="nginx",
            program="nginx",
            settings=NGINX_STREAM_CONF,
            version=("nginx", "-v"),
            command=nginx_stream_command,
            has_udp=True,
        ),
    )
    return {peer.name: peer for peer in peers}


def _forwarder(name: str, command: list[str], version: tuple[str, ...], more: str = "") -> Peer:
    """``more`` is added to both rules."""
    conf = FORWARDER_CONF.replace("protocol =", f"{more}protocol =")
    return forwarder_peer(name, command, version, conf)


def forwarder_peer(name: str, command: list[str], version: tuple[str, ...], conf: str) -> Peer:
    """The forwarder with this configuration."""
    return Peer(
        name=name,
        program=command[0],
        settings=f"{' '.join(command)} -c forwarder.toml\n\n{conf}",
        version=version,
        command=lambda directory: [*command, "-c", str(_forwarder_conf(directory, conf))],
        has_udp=True,
    )


def _forwarder_conf(directory: Path, text: str) -> Path:
    conf = directory / "forwarder.toml"
    conf.write_text(text)
    return conf


def require_programs(names: set[str]) -> None:
    """Raise BenchError for each program that is not installed."""
    if missing := sorted(name for name in names if shutil.which(name) is None):
        raise BenchError(f"not found: {', '.join(missing)}")


def version_of(peer: Peer) -> str:
    """Return the first line of what the program says about its version, empty when nothing."""
    if not peer.version:
        return ""
    done = subprocess.run(peer.version, capture_output=True, text=True, check=False, timeout=10)
    lines = (done.stdout + done.stderr).splitlines()
    return lines[0] if done.returncode == 0 and lines else ""
