"""What the connection log says of one session. Pure: values, no sockets and no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from forwarder.errors import UPSTREAM_HAD_ENDED, Phase, Who

if TYPE_CHECKING:
    from forwarder.errors import CloseReason


class Event(Enum):
    """What has happened to a client."""

    OPENED = "opened"
    ENDED = "ended"
    REFUSED = "refused"


@dataclass(slots=True, kw_only=True)
class Record:
    """One line. ``at`` is seconds since the epoch.

    ``listen`` and ``upstream`` are host and port as the configuration writes them, the port being
    that of this session. ``reached`` is the socket address that was connected to, if there is one.
    ``connect_s`` is None if it was not connected. ``result`` is a word of rinetd for it.
    """

    event: Event
    at: float
    session: str
    rule: str
    protocol: str
    client_host: str
    client_port: int
    listen: tuple[str, int]
    upstream: tuple[str, int]
    result: str
    local: str = ""
    reached: str | None = None
    bytes_c2u: int = 0
    bytes_u2c: int = 0
    connect_s: float | None = None
    duration_s: float = 0.0
    end: str = ""
    detail: str = ""
    worker: int = 0


def rinetd_result(reason: CloseReason) -> str:
    """rinetd's word for an end: "local" is the upstream's side, "remote" the client's.

    It says who ended first. rinetd knows no ends of our own but the timeout of UDP flows, which it
    calls the client's.
    """
    if reason.phase is Phase.CONNECT and reason.who is not Who.CLIENT:
        return "local-connect-failed -"
    if reason.phase is Phase.ACCEPT:
        return "accept-failed -"
    if reason.phase is Phase.HALF_CLOSE:  # the other side had ended before
        is_upstream = reason.who is Who.CLIENT or reason is UPSTREAM_HAD_ENDED
        return "done-local-closed" if is_upstream else "done-remote-closed"
    if reason.who is Who.CLIENT or reason.phase is Phase.IDLE:
        return "done-remote-closed"
    return "done-local-closed"
