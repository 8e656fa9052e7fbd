"""What a server is called where it is asked: in a request, and in the handshake of TLS. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from forwarder.checker.outcome import Aim
    from forwarder.config.model import Check

_UNIX: Final = "unix:"
_NOBODY: Final = "localhost"  # at a unix socket, which has no host


def host_header(check: Check, aim: Aim, default_port: int) -> str:
    """The value of ``Host``, RFC 9110 7.2: the host of the check, or else the server's."""
    host = check.host or server_host(aim.server) or _NOBODY
    if ":" in host:
        host = f"[{host.partition('%')[0]}]"
    port = aim.target.port
    return host if port in (0, default_port) else f"{host}:{port}"


def name_for_tls(check: Check, aim: Aim) -> str | None:
    """Whom to ask for in a handshake, and whom a certificate has to be of; None: nobody."""
    host = check.host or server_host(aim.server)
    return host.partition("%")[0].rstrip(".") or None


@lru_cache(maxsize=4096)
def server_host(server: str) -> str:
    """The host of a server as configured; empty for a unix socket."""
    if server.startswith(_UNIX):
        return ""
    return server.rpartition(":")[0].strip("[]")
