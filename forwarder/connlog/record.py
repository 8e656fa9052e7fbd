"""What the connection log reports of one session. Pure: values, no sockets and no clock."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.stats.reasons import REASONS, UPSTREAM_HAD_ENDED, Phase, Who

if TYPE_CHECKING:
    from forwarder.stats.reasons import CloseReason


class Event(Enum):
    """What happened to a client."""

    OPENED = "opened"
    ENDED = "ended"
    REFUSED = "refused"


class Record(NamedTuple):
    """One line. ``at`` is seconds since the epoch.

    ``listen`` and ``upstream`` are host and port as the configuration writes them, the port being
    that of this session. ``reached`` is the socket address of the upstream, if the session reached
    one. ``connect_s`` is None if it did not. ``result`` is rinetd's word for the end. ``group`` and
    ``server``, as configured, are empty where there is nothing to choose; so is the latter where
    none was chosen.
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
    group: str = ""
    server: str = ""


def rinetd_result(reason: CloseReason) -> str:
    """rinetd's word for an end: "local" is the upstream's side, "remote" the client's.

    It names the side that ended first. Of our own ends rinetd knows only the timeout of UDP flows,
    which it calls the client's.
    """
    return "done-local-closed" if reason is UPSTREAM_HAD_ENDED else _WORDS[reason.code]


def _word(code: str) -> str:
    who, phase = code.split("/")[:2]
    if phase == Phase.CONNECT.value and who != Who.CLIENT.value:
        return "local-connect-failed -"
    if phase == Phase.ACCEPT.value:
        return "accept-failed -"
    if phase == Phase.HALF_CLOSE.value:  # the other side had ended before
        return "done-local-closed" if who == Who.CLIENT.value else "done-remote-closed"
    if who == Who.CLIENT.value or phase == Phase.IDLE.value:
        return "done-remote-closed"
    return "done-local-closed"


_WORDS: Final = {code: _word(code) for code in REASONS}
