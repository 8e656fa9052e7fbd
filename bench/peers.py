"""Who is measured: the forwarder and the programs it is compared with, at their best fair settings.

Each listens on 127.0.0.1:9000 and forwards to 127.0.0.1:9001; a second rule, 9002 to 9003, has the
sessions that are only held while the first is loaded. Starts nothing itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.machine import first_line
from bench.procs import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = list[str] | None

HOST = "127.0.0.1"
LISTEN_PORT = 9000
UPSTREAM_PORT = 9001
HELD_PORT = 9002
HELD_UPSTREAM_PORT = 9003
MORE_RULES_PORT = 10_000  # and up

WORKERS = 2  # processes or threads of every peer that can have more than one
FD_LIMIT = 20_000  # RLIMIT_NOFILE of every process; common as a hard limit in containers
# HAProxy asks for 2.5 descriptors for each session (two sockets, and pipes for a quarter of them)
# and does not start without, so FD_LIMIT bounds it.
HAPROXY_SESSIONS = 7000
ONE_PROCESS_SESSIONS = FD_LIMIT // 2 - 100
NGINX_CONNECTIONS = FD_LIMIT - 100  # of each process; a session has two

_HAPROXY_SPLICE = "    option splice-request\n    option splice-response\n"
HAPROXY_CONF = f"""\
global
    nbthread {WORKERS}
    maxconn {HAPROXY_SESSIONS}
defaults
    mode tcp
    maxconn {HAPROXY_SESSIONS}
{_HAPROXY_SPLICE}    timeout connect 10s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
listen bench
    bind {HOST}:{LISTEN_PORT}
    server upstream {HOST}:{UPSTREAM_PORT}
listen held
    bind {HOST}:{HELD_PORT}
    server upstream {HOST}:{HELD_UPSTREAM_PORT}
"""

RINETD_CONF = f"""\
{HOST} {LISTEN_PORT} {HOST} {UPSTREAM_PORT}
{HOST} {HELD_PORT} {HOST} {HELD_UPSTREAM_PORT}
"""

OXIDINETD_CONF = "".join(
    f'[[forwarding_rules]]\nbind_address = "{HOST}"\nbind_port = {listen}\n'
    f'connect_address = "{HOST}"\nconnect_port = {upstream}\n'
    for listen, upstream in ((LISTEN_PORT, UPSTREAM_PORT), (HELD_PORT, HELD_UPSTREAM_PORT))
)

# A process per session, and large buffers: with the 8 KiB that it has by default it is slower.
SOCAT = (
    *("socat", "-b", "65536"),
    f"TCP4-LISTEN:{LISTEN_PORT},bind={HOST},fork,reuseaddr,backlog=1024,nodelay",
    f"TCP4:{HOST}:{UPSTREAM_PORT},nodelay",
)

NGINX_HEAD = """\
daemon off;
error_log stderr crit;
pid {directory}/nginx.pid;
"""

NGINX_STREAM_CONF = f"""\
worker_processes {WORKERS};
events {{ worker_connections {NGINX_CONNECTIONS}; }}
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
    server {{
        listen {HOST}:{HELD_PORT} reuseport;
        proxy_pass {HOST}:{HELD_UPSTREAM_PORT};
    }}
}}
"""


def _forwarder_rule(listen: int, upstream: int, protocol: str, more: str = "") -> str:
    return (
        f'[[forwarding_rules]]\nlisten = "{HOST}:{listen}"\nupstream = "{HOST}:{upstream}"\n'
        f'protocol = "{protocol}"\n{more}'
    )


def forwarder_conf(more: str = "") -> str:
    """The same rule for TCP and for UDP, for iperf3 -u wants both; ``more`` is added to both."""
    loaded = [_forwarder_rule(LISTEN_PORT, UPSTREAM_PORT, name, more) for name in ("tcp", "udp")]
    return "".join([*loaded, _forwarder_rule(HELD_PORT, HELD_UPSTREAM_PORT, "tcp")])


def many_rules(count: int) -> str:
    """The rules of :func:`forwarder_conf` and so many more that nobody uses."""
    ports = range(MORE_RULES_PORT, MORE_RULES_PORT + count)
    return forwarder_conf() + "".join(_forwarder_rule(p, UPSTREAM_PORT, "tcp") for p in ports)


# The HTTP server behind every peer in the conn measure; the temp paths keep it out of the system's.
NGINX_HTTP_CONF = f"""\
worker_processes 1;
events {{ worker_connections {NGINX_CONNECTIONS}; }}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One program under test.

    ``command`` writes what configuration it needs into a directory and returns the command line;
    None for ``direct``, where the load goes straight to the upstream. ``has_udp``: whether it
    forwards UDP on the same port, too. ``max_sessions`` is what it can hold with FD_LIMIT, 0 if it
    has no second rule. ``forks``: a process for each session, whose CPU is lost when it ends.
    """

    name: str
    program: str
    settings: str
    version: tuple[str, ...] = ()
    command: Callable[[Path], list[str]] | None = None
    has_udp: bool = False
    forks: bool = False
    is_python: bool = False
    max_sessions: int = ONE_PROCESS_SESSIONS


def rinetd_command(directory: Path) -> list[str]:
    """Write rinetd's configuration; the pid file would be in /run otherwise."""
    conf = directory / "rinetd.conf"
    conf.write_text(f"{RINETD_CONF}pidlogfile {directory}/rinetd.pid\n")
    return ["rinetd", "-f", "-c", str(conf)]


def haproxy_command(directory: Path, conf: str = HAPROXY_CONF) -> list[str]:
    """Write HAProxy's configuration; -db keeps it in the foreground, one process."""
    path = directory / "haproxy.cfg"
    path.write_text(conf)
    return ["haproxy", "-db", "-f", str(path)]


def oxidinetd_command(program: str, directory: Path) -> list[str]:
    """Write the configuration of oxidinetd, which has as many threads as its environment says."""
    conf = directory / "oxidinetd.toml"
    conf.write_text(OXIDINETD_CONF)
    return ["env", f"SMOL_THREADS={WORKERS}", program, "-c", str(conf)]


def nginx_stream_command(directory: Path) -> list[str]:
    """Write the configuration of nginx as a TCP proxy."""
    head = nginx_stream_module() + NGINX_HEAD.format(directory=directory)
    return _nginx(directory, "nginx-stream.conf", head + NGINX_STREAM_CONF)


def nginx_http_command(directory: Path, conf: str = NGINX_HTTP_CONF) -> list[str]:
    """Write the configuration of nginx as the HTTP upstream."""
    text = NGINX_HEAD.format(directory=directory) + _fill(conf, directory)
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


def all_peers(forwarder: list[str], oxidinetd: str = "oi") -> dict[str, Peer]:
    """Return every peer by name, in report order, those that are measured by default first.

    ``forwarder`` is the command that starts it, ``oxidinetd`` the path to its binary. Settings name
    programs without their directories: reports go elsewhere.
    """
    version = (*forwarder, "--version")
    copy = [*forwarder, "--relay", "copy"]

    def ours(name: str, conf: str = "", workers: int = WORKERS, command: Command = None) -> Peer:
        words = [*(command or forwarder), "--workers", str(workers)]
        return forwarder_peer(name, words, version, conf or forwarder_conf())

    peers = (
        Peer(name="direct", program="", settings="no forwarder: client to upstream", has_udp=True),
        ours("forwarder"),
        ours("forwarder-copy", command=copy),
        ours("forwarder-1", workers=1),
        Peer(
            name="rinetd",
            program="rinetd",
            settings=f"rinetd -f, no log\n\n{RINETD_CONF}",
            version=("rinetd", "--version"),
            command=rinetd_command,
        ),
        Peer(
            name="haproxy",
            program="haproxy",
            settings=HAPROXY_CONF,
            version=("haproxy", "-v"),
            command=haproxy_command,
            max_sessions=HAPROXY_SESSIONS,
        ),
        Peer(
            name="haproxy-copy",
            program="haproxy",
            settings="as haproxy, without the two options splice-*",
            version=("haproxy", "-v"),
            command=lambda d: haproxy_command(d, HAPROXY_CONF.replace(_HAPROXY_SPLICE, "")),
            max_sessions=HAPROXY_SESSIONS,
        ),
        Peer(
            name="nginx",
            program="nginx",
            settings=NGINX_STREAM_CONF,
            version=("nginx", "-v"),
            command=nginx_stream_command,
            has_udp=True,
            max_sessions=WORKERS * ONE_PROCESS_SESSIONS,
        ),
        Peer(
            name="socat",
            program="socat",
            settings=" ".join(SOCAT),
            version=("socat", "-V"),
            command=lambda _directory: [*SOCAT],
            forks=True,
            max_sessions=0,
        ),
        Peer(
            name="oi",
            program=oxidinetd,
            settings=f"SMOL_THREADS={WORKERS} {Path(oxidinetd).name}\n\n{OXIDINETD_CONF}",
            version=(oxidinetd, "--version"),
            command=lambda directory: oxidinetd_command(oxidinetd, directory),
        ),
        ours("forwarder-4", workers=4),
        ours("forwarder-1000-rules", many_rules(1000)),
        ours("forwarder-limited", forwarder_conf("max_sessions = 1_000_000\n")),
        ours("forwarder-metered", forwarder_conf('bandwidth = "1000Gbit"\n')),
    )
    return {peer.name: peer for peer in peers}


# Measured only when asked for by name: the forwarder beside itself.
ON_REQUEST = ("forwarder-4", "forwarder-1000-rules", "forwarder-limited", "forwarder-metered")


def forwarder_peer(name: str, command: list[str], version: tuple[str, ...], conf: str) -> Peer:
    """The forwarder with this configuration."""
    head, _, rest = conf.partition(f'{MORE_RULES_PORT}"')
    shown = f'{head}{MORE_RULES_PORT}" ... and so on\n' if rest else conf
    words = " ".join([Path(command[0]).name, *command[1:]])
    return Peer(
        name=name,
        program=command[0],
        settings=f"{words} -c forwarder.toml\n\n{shown}",
        version=version,
        command=lambda directory: [*command, "-c", str(_forwarder_conf(directory, conf))],
        has_udp=True,
        is_python=True,
        max_sessions=WORKERS * ONE_PROCESS_SESSIONS,
    )


def _forwarder_conf(directory: Path, text: str) -> Path:
    conf = directory / "forwarder.toml"
    conf.write_text(text)
    return conf


def is_here(peer: Peer) -> bool:
    """Whether its program is installed."""
    return not peer.program or shutil.which(peer.program) is not None


def require_programs(names: set[str]) -> None:
    """Raise BenchError for each program that is not installed."""
    if missing := sorted(name for name in names if shutil.which(name) is None):
        raise BenchError(f"not found: {', '.join(missing)}")


def version_of(peer: Peer) -> str:
    """Return the first line of what the program says about its version, empty when nothing."""
    return first_line(peer.version) if peer.version else ""
