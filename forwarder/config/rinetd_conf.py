"""Text in the language of rinetd 0.73 to a RawConfig.

One statement per line; the grammar is that of rinetd's ``parse.peg``. Pure: port numbers of service
names come from a function passed in. Differences, all on purpose: quotes around a file name are
taken off; ``pidfile`` means ``pidlogfile``; access patterns may be CIDR networks; an access rule
behind the first forwarding rule belongs to that rule (0.73 lost the first such line); addresses may
have a ``%scope``; what rinetd would read as a forwarding rule for a host called ``allow`` or
``logfile`` is read as that directive.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import ClassVar

from forwarder.config.address import MAX_PORT, Address, AddressError, is_ip, parse_host
from forwarder.config.durations import MAX_DURATION_S
from forwarder.config.model import AccessRule, LogFormat, LogPlace, Protocol, Upstream, Verdict
from forwarder.config.raw import Issues, Placed, RawConfig, RawRule
from forwarder.errors import Place

ServicePort = Callable[[str, str], int]
"""(service name, "tcp" or "udp") -> port; raises OSError when there is no such service."""

KEYWORDS = ("allow", "deny", "logcommon", "logfile", "pidfile", "pidlogfile")

# The spellings of the PEG's "-": blanks and tabs, nothing else.
_FIRST_WORD = re.compile(r"[^ \t#]+")
_RULE = re.compile(
    r"([^ \t]+)[ \t]+([^ \t]+)[ \t]+([^ \t]+)[ \t]+([^ \t\[]+)[ \t]*(\[.*)?", re.DOTALL
)
_PORT = re.compile(r"([0-9]+|[A-Za-z_][A-Za-z0-9_-]*)(?:/(tcp|udp))?")
_RANGE = re.compile(r"[0-9]+-[0-9]")
_PATTERN_LINE = re.compile(r"[ \t]+([^ \t#]+)[ \t]*(?:#.*)?", re.DOTALL)
FILE_LINE = re.compile(r'[ \t]+("[^"]+"|[^ \t"#][^ \t]*)[ \t]*(?:#.*)?', re.DOTALL)
_BARE_LINE = re.compile(r"[ \t]*(?:#.*)?", re.DOTALL)
_OPTION = re.compile(r"[ \t]*([^ \t=]*)[ \t]*(?:=[ \t]*(.*?))?[ \t]*", re.DOTALL)
_LAST_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")

_RULE_FORM = "BINDADDRESS BINDPORT CONNECTADDRESS CONNECTPORT [timeout=SECONDS, src=ADDRESS]"
_PROTOCOLS = {
    ("tcp", "tcp"): Protocol.TCP,
    ("udp", "udp"): Protocol.UDP,
    ("udp", "tcp"): Protocol.UDP_TO_TCP,
    ("tcp", "udp"): Protocol.TCP_TO_UDP,
}


def parse(text: str, source: str, issues: Issues, service_port: ServicePort) -> RawConfig:
    """Read a whole file. Problems go to ``issues``; valid parts are still returned."""
    reader = Reader(source, issues, service_port)
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        reader.read_line(number, line.removesuffix("\r"))
    if lines[-1].partition("#")[0].strip(" \t"):
        issues.warn(
            Place(source, len(lines), 1),
            "the last line does not end: rinetd 0.73 ignores it silently, here it counts",
            hint="end it, or take it out if clients depend on that",
        )
    # rinetd runs without a rule, as the file that Debian installs has it.
    reader.raw.may_lack_rules = True
    return reader.raw


class Reader:
    """Reads line by line. Owns the configuration that grows. ``rule_form`` is a rule's line."""

    rule_form: ClassVar[re.Pattern[str]] = _RULE

    def __init__(self, source: str, issues: Issues, service_port: ServicePort) -> None:
        self.raw = RawConfig()
        self._source = source
        self._issues = issues
        self._service_port = service_port
        self._line = 0
        self._seen: set[str] = set()
        self._log_file: Placed[str] | None = None
        self._log_format = LogFormat.RINETD
        # Where the next access rule goes.
        self._access = self.raw.access

    def read_line(self, number: int, line: str) -> None:
        self._line = number
        word = _FIRST_WORD.match(line, len(line) - len(line.lstrip(" \t")))
        if word is None:
            return
        if word[0] in KEYWORDS:
            self._read_directive(word[0], line, word.start(), word.end())
        else:
            self._read_rule(line.partition("#")[0].rstrip(" \t"), word.start())

    def _place(self, offset: int) -> Place:
        return Place(self._source, self._line, offset + 1)

    def _read_directive(self, keyword: str, line: str, start: int, end: int) -> None:
        if keyword in {"allow", "deny"}:
            self._read_access(Verdict(keyword), line, end)
            return
        if keyword == "logcommon":
            if not _BARE_LINE.fullmatch(line, end):
                self._issues.error(self._place(end), "logcommon is followed by more text")
            self._log_format = LogFormat.COMMON
            self._set_logs()
            return
        match = FILE_LINE.fullmatch(line, end)
        if match is None:
            self._issues.error(
                self._place(end),
                f"{keyword} is not followed by one file name",
                allowed=f'{keyword} /path/name or {keyword} "/path/name"',
                hint="a name with blanks needs double quotes around it",
            )
            return
        name = match[1].strip('"') if match[1].startswith('"') else match[1]
        if keyword == "logfile":
            self._note(keyword, start)
            self._log_file = Placed(name, self._place(start))
            self._set_logs()
        else:
            self._note("pidlogfile", start)
            self.raw.settings = replace(self.raw.settings, pid_file=name, is_pid_file_optional=True)

    def _note(self, keyword: str, start: int) -> None:
        if keyword in self._seen:
            self._issues.warn(self._place(start), f"{keyword} is given again; the last one counts")
        self._seen.add(keyword)

    def _set_logs(self) -> None:
        """logfile sets the place and logcommon the format, in any order."""
        file = self._log_file
        if file is not None:
            place = LogPlace(
                to=file.value, format=self._log_format, place=file.place, is_optional=True
            )
            self.raw.settings = replace(self.raw.settings, logs=(place,))

    def _read_access(self, verdict: Verdict, line: str, end: int) -> None:
        match = _PATTERN_LINE.fullmatch(line, end)
        if match is None:
            self._issues.error(
                self._place(end),
                f"{verdict.value} is not followed by one pattern",
                allowed=f"{verdict.value} PATTERN",
                hint="give every pattern a line of its own",
            )
            return
        place = self._place(match.start(1))
        self._access.append(AccessRule(verdict=verdict, pattern=match[1], place=place))

    def _read_rule(self, line: str, start: int) -> None:
        # What follows belongs to this rule, also when the rule itself turns out to be broken.
        self.raw.rules_seen += 1
        self._access = self.raw.dropped_access
        match = self.rule_form.fullmatch(line, start)
        if match is None:
            self._explain(line, start)
        else:
            self._take_rule(match, start)

    def _take_rule(self, match: re.Match[str], start: int) -> None:
        """Add the rule that a line has, or report what is wrong with it."""
        listen_host = self._host(match[1], match.start(1))
        listen_port = self._port(match[2], match.start(2))
        upstream_host = self._host(match[3], match.start(3))
        upstream_port = self._port(match[4], match.start(4))
        options = self._options(match[5], match.start(5)) if match[5] else {}
        if not (listen_host and listen_port and upstream_host and upstream_port):
            return
        if listen_port[1] != upstream_port[1]:
            self._warn_one_sided(listen_port[1], match.start(2))
        self._access = []
        rule = RawRule(
            place=self._place(start),
            listen=Placed(Address(listen_host, listen_port[0]), self._place(start)),
            upstreams=(
                Placed(
                    Upstream(Address(upstream_host, upstream_port[0])),
                    self._place(match.start(3)),
                ),
            ),
            protocol=_PROTOCOLS[listen_port[1], upstream_port[1]],
            access=self._access,
        )
        rule.put("source_address", options.get("src"))
        timeout = options.get("timeout")
        if timeout and int(timeout.value):  # rinetd takes 0 for "not given"
            rule.put("timeout", Placed(float(timeout.value), timeout.place))
        self.raw.rules.append(rule)

    def _warn_one_sided(self, listen_kind: str, offset: int) -> None:
        side = "listening" if listen_kind == "udp" else "connecting"
        self._issues.warn(
            self._place(offset),
            f"only the {side} side says /udp, so this rule translates between UDP and TCP",
            hint="to forward UDP write /udp on both sides",
        )

    def _explain(self, line: str, start: int) -> None:
        words = _FIRST_WORD.findall(line, start)
        near = get_close_matches(words[0].lower(), KEYWORDS, 1)
        if near:
            allowed, hint = "", f"did you mean {near[0]}? Keywords are in lower case"
        else:
            allowed = f"{_RULE_FORM}, or one of {', '.join(KEYWORDS)}"
            hint = f"a forwarding rule has 4 fields before its options, not {len(words)}"
        self._issues.error(
            self._place(start),
            f"{line[start:][:80]!r} is neither a forwarding rule nor a directive",
            allowed=allowed,
            hint=hint,
        )

    def _host(self, text: str, offset: int) -> str | None:
        try:
            host = parse_host(text)
        except AddressError as error:
            what = str(error)
        else:
            last_label = host.rstrip(".").rpartition(".")[2]
            if text == "*":
                what = "'*' is no address in this file format"
            elif is_ip(host) or _LAST_LABEL.fullmatch(last_label):
                return host
            else:
                what = f"{text!r}: the last part of a name may not begin with a digit"
        allowed = "IPv4, 0 (every IPv4 address), IPv6, [IPv6] or a host name"
        hint = "the TOML format has unix sockets" if text.startswith("unix:") else ""
        self._issues.error(self._place(offset), what, allowed=allowed, hint=hint)
        return None

    def _port(self, text: str, offset: int) -> tuple[int, str] | None:
        """Read a port and its transport."""
        match = _PORT.fullmatch(text)
        if match is None:
            what = f"{text!r} is not a port"
        else:
            kind = match[2] or "tcp"
            if not match[1][0].isdigit():
                try:
                    return self._service_port(match[1], kind), kind
                except OSError:
                    what = f"{match[1]!r} is not a known {kind} service"
            elif len(match[1]) <= 9 and 1 <= int(match[1]) <= MAX_PORT:
                return int(match[1]), kind
            else:
                what = f"{text!r} is out of range"
        hint = "only /tcp and /udp may follow a port" if "/" in text and match is None else ""
        if _RANGE.match(text):
            hint = "the TOML format has ranges of ports"
        self._issues.error(
            self._place(offset),
            what,
            allowed=f"1 to {MAX_PORT} or a service name, then /tcp or /udp or nothing (tcp)",
            hint=hint,
        )
        return None

    def _options(self, block: str, offset: int) -> dict[str, Placed[str]]:
        """Read ``[timeout=N, src=ADDRESS]``."""
        options: dict[str, Placed[str]] = {}
        if not block.endswith("]"):
            self._issues.error(
                self._place(offset), "the option block has no closing ]", allowed=_RULE_FORM
            )
            return options
        at = offset + 1
        for text in block[1:-1].split(","):
            place = self._place(at + len(text) - len(text.lstrip(" \t")))
            at += len(text) + 1
            match = _OPTION.fullmatch(text)
            key, value = (match[1], match[2]) if match else (text, None)
            checked = self._option(key, value, place)
            if checked is None:
                continue
            if key in options:
                self._issues.warn(place, f"{key} is given again; the last one counts")
            options[key] = Placed(checked, place)
        return options

    def _option(self, key: str, value: str | None, place: Place) -> str | None:
        """Check one option and return its value."""
        if key == "src" and value:
            return self._host(value, place.column - 1)
        if key == "timeout" and value is not None:
            is_number = len(value) <= 9 and value.isascii() and value.isdigit()
            if is_number and int(value) <= MAX_DURATION_S:
                return value
            self._issues.error(
                place,
                f"timeout is {value[:40]!r}",
                allowed=f"a whole number of seconds from 0 to {MAX_DURATION_S}",
            )
            return None
        near = get_close_matches(key.lower(), ("timeout", "src"), 1)
        self._issues.error(
            place,
            f"{key[:40]!r} is not an option"
            if key not in {"src", "timeout"}
            else f"{key}= is empty",
            allowed="timeout=SECONDS and src=ADDRESS, with a comma between them",
            hint=f"did you mean {near[0]}=?" if near and key != near[0] else "",
        )
        return None
