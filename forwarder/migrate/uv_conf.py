"""rinetd-uv's .conf to a draft: rinetd.conf with more words, unix sockets and ``include``.

Differs from rinetd-uv in that ``pidlogfile`` is read as ``pidfile``; rinetd-uv refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from forwarder.config import rinetd_conf
from forwarder.config.address import Address, AddressError, parse_unix
from forwarder.config.model import Protocol, Upstream
from forwarder.config.raw import Placed, RawRule
from forwarder.errors import Place
from forwarder.migrate import uv_names, uv_words
from forwarder.migrate.draft import Draft
from forwarder.migrate.rinetd import note_line

if TYPE_CHECKING:
    from forwarder.config.address import Endpoint

Find = Callable[[str, str], list[tuple[str, str]]]
"""(pattern, the file that includes) -> names and texts of the files that match."""

MAX_DEPTH: Final = 10  # rinetd-uv's

_UNIX: Final = r"(unix:[^ \t\[\]]+)"
_RULE: Final = re.compile(
    rf"(?:{_UNIX}|([^ \t]+)[ \t]+([^ \t]+))[ \t]+"
    rf"(?:{_UNIX}|([^ \t]+)[ \t]+([^ \t\[]+))[ \t]*(\[.*)?",
    re.DOTALL,
)
_OPTIONS: Final = ("connect-timeout", "dns-refresh", "keepalive", "mode", "src", "timeout")
_SWITCH: Final = ("on", "off")
_IN_YAML_ONLY: Final = "rinetd-uv 2.1 does that in YAML only, though its manual says otherwise"


def read(text: str, source: str, service_port: Callable[[str, str], int], find: Find) -> Draft:
    """Read a whole file, and those that it includes. Problems are in the draft."""
    reader = _UvReader(source, service_port, find)
    reader.read_text(text, source, ())
    uv_words.finish(reader.draft, Place(source), reader.flows, reader.names)
    return reader.draft


class _UvReader(rinetd_conf.Reader):
    """Reads line by line, file by file."""

    rule_form = _RULE

    def __init__(self, source: str, service_port: Callable[[str, str], int], find: Find) -> None:
        self.draft = Draft()
        super().__init__(source, self.draft.issues, service_port)
        self.draft.raw = self.raw
        self.flows: Placed[int] | None = None
        self.names = uv_names.Names(expands=False, remark=_IN_YAML_ONLY)
        self._find = find
        self._files: tuple[str, ...] = ()

    def read_text(self, text: str, source: str, files: tuple[str, ...]) -> None:
        """Read one file; ``files`` are those that lead to it."""
        outer = self._source, self._files
        self._source, self._files = source, (*files, source)
        for number, line in enumerate(text.split("\n"), 1):
            order = self.draft.order
            order[source, number] = len(order) + 1
            note_line(self.draft, line.removesuffix("\r"), Place(source, number))
            self.read_line(number, line.removesuffix("\r"))
        self._source, self._files = outer

    def read_line(self, number: int, line: str) -> None:
        """Read one line: a word of rinetd-uv's own, or what rinetd knows, too."""
        words = line.partition("#")[0].split(maxsplit=1)
        if not words or words[0] not in uv_words.CONF_WORDS:
            super().read_line(number, line)
            return
        self._line = number
        word, start = words[0], line.index(words[0])
        match = rinetd_conf.FILE_LINE.fullmatch(line, start + len(word))
        if match is None:
            self._issues.error(self._place(start), f"{word} is not followed by one value")
            return
        self._read_word(word, match[1].strip('"'), self._place(start))

    def _read_word(self, word: str, value: str, place: Place) -> None:
        if word == "include":
            self._include(value, place)
        elif word == "connect-timeout":
            found = uv_words.seconds(self.draft, word, value, place)
            if found:
                self.raw.defaults["connect_timeout"] = found
                self.draft.settings["connect_timeout"] = place
        elif word == "max-udp-connections":
            self.flows = uv_words.flows(self.draft, word, value, place)
        elif word == "listen-backlog":
            uv_words.backlog(self.draft, word, value, place)
        elif word == "dns-multi-ip-expand":
            if value in _SWITCH:
                self.names.set_expands(f"{word} {value}", place, is_on=value == "on")
            else:
                self._issues.error(place, f"{word} is {value[:40]!r}", allowed="on or off")
        elif word == "dns-multi-ip-proto":
            self.names.set_family(self.draft, value, f"{word} {value}", place)
        else:
            self.draft.leave_out(place, f"{word} {value}", uv_words.CONF_WORDS[word])

    def _include(self, pattern: str, place: Place) -> None:
        if len(self._files) > MAX_DEPTH:
            self._issues.error(place, f"more than {MAX_DEPTH} files include one another")
            return
        found = self._find(pattern, self._source)
        if not found:
            self.draft.differ(place, f"include {pattern} matches no file")
        for name, text in found:
            if name in self._files:
                self._issues.error(place, f"{name} includes itself")
            else:
                self.draft.differ(place, f"{name} is written in place of its include")
                self.read_text(text, name, self._files)
        self._line = place.line

    # -- rules

    def _take_rule(self, match: re.Match[str], start: int) -> None:
        listen = self._endpoint(match, 1)
        upstream = self._endpoint(match, 4)
        options = self._options(match[7], match.start(7)) if match[7] else {}
        if listen is None or upstream is None:
            return
        endpoint, kind = listen
        rule = RawRule(
            place=self._place(start),
            listen=Placed(endpoint, self._place(start)),
            upstreams=(
                Placed(Upstream(upstream[0]), self._place(match.start(4 if match[4] else 5))),
            ),
            protocol=Protocol.UDP if kind == "udp" else Protocol.TCP,
        )
        rule.put("source_address", options.get("src"))
        self._access = rule.access
        self._apply(rule, options)
        uv_words.finish_rule(self.draft, rule, upstream[1], rule.upstreams[0].place)

    def _endpoint(self, match: re.Match[str], group: int) -> tuple[Endpoint, str] | None:
        """An address and its transport; a unix socket has none."""
        if match[group]:
            try:
                return parse_unix(match[group].removeprefix("unix:")), ""
            except AddressError as error:
                self._issues.error(self._place(match.start(group)), str(error))
                return None
        host = self._host(match[group + 1], match.start(group + 1))
        port = self._port(match[group + 2], match.start(group + 2))
        return (Address(host, port[0]), port[1]) if host and port else None

    def _apply(self, rule: RawRule, options: dict[str, Placed[str]]) -> None:
        draft = self.draft
        for key, option in options.items():
            value, place = option.value, option.place
            if key == "timeout":
                rule.put("timeout", uv_words.seconds(draft, key, value, place))
            elif key == "connect-timeout":
                found = uv_words.seconds(draft, key, value, place)
                rule.put("connect_timeout", found if found and found.value else None)
            elif key == "mode":
                rule.put("mode", uv_words.mode(draft, value, place, rule.listen.value))
            elif key == "keepalive":
                uv_words.keepalive(draft, rule, f"keepalive={value}", place, is_on=value == "on")
            elif key == "dns-refresh":
                why = uv_words.CONF_WORDS["dns-refresh"]
                draft.leave_out(place, f"{key}={value}", why, in_rule=True)

    def _option(self, key: str, value: str | None, place: Place) -> str | None:
        """Check one option and return its value; numbers are checked later."""
        if key not in _OPTIONS or not value:
            known = ", ".join(_OPTIONS)
            self._issues.error(place, f"{key[:40]!r} is not an option with a value", allowed=known)
            return None
        if key == "src":
            return self._host(value, place.column - 1)
        if key == "keepalive" and value not in _SWITCH:
            self._issues.error(place, f"keepalive is {value[:40]!r}", allowed="on or off")
            return None
        return value
