"""A forwarder with a control socket and a connection log in several places, and reading these."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from support import control
from support.ends import Link, open_link, receive_to_end
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from support.forwarder import Forwarder

RINETD: Final = re.compile(
    r"[0-9]{2}/[A-Z][a-z]{2}/[0-9]{4}:[0-9]{2}:[0-9]{2}:[0-9]{2} "
    r"\t([^\t]+)\t([^\t]+)\t([0-9]+)\t([^\t]+)\t([0-9]+)\t([0-9]+)\t([0-9]+)\t([a-z -]+)"
)
COMMON: Final = re.compile(
    r"([^ ]+) - - \[[0-9]{2}/[A-Z][a-z]{2}/[0-9]{4}:[0-9]{2}:[0-9]{2}:[0-9]{2}  [+-][0-9]{4}\] "
    r'"GET /rinetd-services/([^/]+)/([0-9]+)/([^/]+)/([0-9]+)/([a-z -]+) HTTP/1\.0" '
    r"200 ([0-9]+) - - - ([0-9]+)"
)


def places(*entries: tuple[object, str]) -> str:
    """TOML of places: where to, and the format."""
    return "".join(f'[[logs]]\nto = "{to}"\nformat = "{how}"\n' for to, how in entries)


def json_lines(text: str) -> list[dict[str, object]]:
    """Every line, each of which must be whole and an object."""
    assert not text or text.endswith("\n"), text[-200:]
    found = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(entry, dict) for entry in found)
    return found


def read_json(path: Path) -> list[dict[str, object]]:
    """Every line of a log in JSON."""
    return json_lines(path.read_text())


@dataclass
class Logged:
    """A forwarder whose configuration is a file, with what a test asks of it."""

    forwarder: Forwarder
    config: Path
    control: Path
    address: tuple[str, int]
    upstream: socket.socket
    used: list[int] = field(default_factory=list)  # ports of clients

    def ask(self, op: str, **more: object) -> dict[str, object]:
        """The answer to a request over the control socket."""
        return control.ask(self.control, op, **more)

    def total(self, key: str) -> int:
        """One of the counters of all workers."""
        totals = self.ask("status")["totals"]
        assert isinstance(totals, dict)
        return int(totals[key])

    def rule(self, index: int = 0) -> dict[str, object]:
        """A rule in the status."""
        rules = self.ask("status")["rules"]
        assert isinstance(rules, list)
        found = rules[index]
        assert isinstance(found, dict)
        return found

    def ends(self, index: int = 0) -> dict[str, int]:
        """How sessions of a rule have ended; checks that none has no reason, nor two."""
        rule = self.rule(index)
        ends = rule["ends"]
        assert isinstance(ends, dict)
        gone, come = (
            sum(int(str(rule[key])) for key in keys)
            for keys in (("sessions", "moved_out"), ("sessions_total", "refused", "moved_in"))
        )
        assert sum(ends.values()) + gone == come, rule
        return ends

    def reload(self, text: str) -> dict[str, object]:
        """Put another configuration in force; returns the answer."""
        self.config.write_text(text)
        return self.ask("reload")

    def link(self) -> Link:
        """Open a session."""
        link = open_link(self.address, self.upstream)
        self.used.append(link.client.getsockname()[1])
        return link

    def visit(self, count: int = 1, size: int = 3) -> list[int]:
        """Sessions one after the other, which clients end; returns the ports of the clients."""
        for _ in range(count):
            link = self.link()
            with link.client, link.upstream:
                link.client.sendall(bytes(size))
                link.client.shutdown(socket.SHUT_WR)
                receive_to_end(link.upstream)
                link.upstream.shutdown(socket.SHUT_WR)
                receive_to_end(link.client)
        return self.used[-count:]

    def wait_lines(self, path: Path, ports: Iterable[int]) -> list[dict[str, object]]:
        """Wait until a JSON log has one line for each of these clients, and no further ones."""
        wanted = sorted(ports)

        def has_them() -> bool:
            return path.exists() and path.read_text().count("\n") >= len(wanted)

        eventually(has_them, lambda: path.read_text()[-2000:] if path.exists() else "no file")
        found = read_json(path)
        assert sorted(int(str(entry["client_port"])) for entry in found) == wanted
        return found

    def wait_some(self, path: Path, ports: Iterable[int]) -> None:
        """Wait until a JSON log has a line for each of these clients, whatever else."""
        wanted = set(ports)
        eventually(
            lambda: wanted <= {int(str(entry["client_port"])) for entry in read_json(path)},
            lambda: path.read_text()[-2000:],
        )
