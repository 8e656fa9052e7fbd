"""How a record is written: rinetd's two formats, byte for byte, and lines of JSON.

Reads nothing but the local time zone. Every function returns a whole line with its end, or None for
an event that its format leaves out. Text that a peer or a name server can influence is escaped.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.config.model import LogFormat
from forwarder.connlog.record import Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.connlog.record import Record

_MONTHS: Final = (
    *("Jan", "Feb", "Mar", "Apr", "May", "Jun"),
    *("Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
)
# rinetd separates fields by tabs and lines by newlines; nothing else is special there.
_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


class _Clock:
    """Texts of the current second; formatting one costs as much as the rest of a line."""

    def __init__(self) -> None:
        self._second = -1
        self.rinetd = self.zone = self.iso = self.iso_zone = ""

    def set(self, at: float) -> None:
        """Set the texts to this moment."""
        second = int(at)
        if second == self._second:
            return
        self._second = second
        now = time.localtime(second)
        month = _MONTHS[now.tm_mon - 1]  # rinetd's are English, whatever the locale
        clock = f"{now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02}"
        self.rinetd = f"{now.tm_mday:02}/{month}/{now.tm_year}:{clock} "
        minutes = abs(now.tm_gmtoff) // 60
        sign = "-" if now.tm_gmtoff < 0 else "+"
        self.zone = f"{sign}{minutes // 60:02}{minutes % 60:02}"
        self.iso = f"{now.tm_year}-{now.tm_mon:02}-{now.tm_mday:02}T{clock}"
        self.iso_zone = f"{sign}{minutes // 60:02}:{minutes % 60:02}"


_clock: Final = _Clock()
# Looking a member up in the class costs 100 ns in Python 3.11, its value as much again.
_OPENED, _REFUSED = Event.OPENED, Event.REFUSED


def rinetd_line(record: Record) -> str:
    """The tab format: time, client, listen, upstream, bytes from and to the client, result."""
    _clock.set(record.at)
    (listen_host, listen_port), (host, port) = record.listen, record.upstream
    return (
        f"{_clock.rinetd}\t{_plain(record.client_host)}\t{_plain(listen_host)}\t{listen_port}"
        f"\t{_plain(host)}\t{port}\t{record.bytes_c2u}\t{record.bytes_u2c}\t{record.result}\n"
    )


def common_line(record: Record) -> str:
    """rinetd's web server format. Its byte counts are in the reverse order of the other's."""
    _clock.set(record.at)
    (listen_host, listen_port), (host, port) = record.listen, record.upstream
    return (
        f"{_plain(record.client_host)} - - [{_clock.rinetd} {_clock.zone}] "
        f'"GET /rinetd-services/{_plain(listen_host)}/{listen_port}/{_plain(host)}/{port}/'
        f'{record.result} HTTP/1.0" 200 {record.bytes_u2c} - - - {record.bytes_c2u}\n'
    )


def json_line(record: Record) -> str | None:
    """A line of JSON for each client that was refused and each session that has ended."""
    event = record.event
    if event is _OPENED:
        return None
    _clock.set(record.at)
    word = "refused" if event is _REFUSED else "ended"
    connect_ms = "null" if record.connect_s is None else f"{record.connect_s * 1000:.0f}"
    reached = "null" if record.reached is None else _json(record.reached)
    chosen = ""
    if record.group:
        server = _json(record.server) if record.server else "null"
        chosen = f'"group":{_json(record.group)},"server":{server},'
    return (
        f'{{"time":"{_clock.iso}.{int(record.at * 1000) % 1000:03}{_clock.iso_zone}",'
        f'"event":"{word}","id":"{record.session}","rule":{_json(record.rule)},'
        f'"protocol":"{record.protocol}","client":{_json(record.client_host)},'
        f'"client_port":{record.client_port},"local":{_json(record.local)},'
        f'"upstream":{reached},{chosen}"bytes_c2u":{record.bytes_c2u},"bytes_u2c":{record.bytes_u2c},'
        f'"connect_ms":{connect_ms},"duration_ms":{record.duration_s * 1000:.0f},'
        f'"worker":{record.worker},"end":"{record.end}","detail":{_json(record.detail)}}}\n'
    )


class Format(NamedTuple):
    """How records become lines, and which have to be made for it beside those of sessions' ends.

    ``wants_opened``: one when a session has reached its upstream; ``wants_refused``: one of each
    client that gets no session. For one that it does not want ``line`` returns None.
    """

    line: Callable[[Record], str | None]
    wants_opened: bool
    wants_refused: bool


FORMATS: Final = {
    LogFormat.RINETD: Format(rinetd_line, wants_opened=True, wants_refused=True),
    LogFormat.COMMON: Format(common_line, wants_opened=True, wants_refused=True),
    LogFormat.JSON: Format(json_line, wants_opened=False, wants_refused=True),
}


def _plain(text: str) -> str:
    return text if text.isprintable() else text.translate(_CONTROLS)


@lru_cache(maxsize=1024)  # rules, our addresses, upstreams and many clients recur
def _json(text: str) -> str:
    # Most are addresses and names without anything to escape.
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return json.dumps(text)
