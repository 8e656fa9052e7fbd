"""A forwarder whose rules have names, and what the test lets these mean."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from support import control
from support.configured import Configured
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

    from support.forwarder import Forwarder
    from support.names import FakeNames

Address = tuple[str, int]


class Named:
    """A forwarder whose rules lead to names, and the one upstream that these may mean."""

    def __init__(
        self, launch: Callable[..., Forwarder], directory: Path, stack: ExitStack, names: FakeNames
    ) -> None:
        self.names = names
        self._launch = launch
        self._stack = stack
        self.path = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self.upstream = stack.enter_context(listen())
        self.hosts: dict[str, str] = {}  # names in place of the addresses that rules listen on
        self._addresses: dict[str, Address] = {}
        self._holders: dict[str, socket.socket] = {}
        self.it: Configured

    def address(self, rule: str) -> Address:
        """Where a rule listens."""
        if rule not in self._addresses:
            self._holders[rule] = self._stack.enter_context(reserve_port())
            self._addresses[rule] = self._holders[rule].getsockname()
        return self._addresses[rule]

    def taken(self, rule: str) -> socket.socket:
        """Listen where a rule wants to."""
        address = self.address(rule)
        self._holders[rule].close()
        return listen(*address)

    def text(self, top: str = "", **rules: str) -> str:
        """The configuration: hosts that each rule leads to, separated by spaces."""
        port = self.upstream.getsockname()[1]
        found = f'workers = 2\ncontrol = "{self.control}"\n{top}\n'
        for rule, hosts in rules.items():
            upstreams = ", ".join(f'"{host}:{port}"' for host in hosts.split())
            host, at = self.address(rule)
            host = self.hosts.get(rule, host)
            found += (
                f'[[forwarding_rules]]\nname = "{rule}"\nlisten = "{host}:{at}"\n'
                f"upstream = [{upstreams}]\n"
            )
        return found

    def start(self, top: str = "", **rules: str) -> Configured:
        """Start with these rules; returns when it is ready."""
        return self._start(self.text(top, **rules))

    def begin(self, *arguments: str, **rules: str) -> Configured:
        """Start with these rules, and these arguments beside; returns at once."""
        return self._start(self.text(**rules), *arguments, expect_ready=False)

    def _start(self, text: str, *arguments: str, expect_ready: bool = True) -> Configured:
        self.path.write_text(text)
        forwarder = self._launch("-c", str(self.path), *arguments, expect_ready=expect_ready)
        self.it = Configured(forwarder, self.path)
        return self.it

    def reload(self, top: str = "", **rules: str) -> str:
        """Reload with these rules; returns the outcome."""
        return self.it.reload(self.text(top, **rules))

    def assert_serves(self, rule: str, clients: int = 6) -> None:
        """Each of some clients, one after the other, gets through."""
        for _ in range(clients):
            with connect(self.address(rule)) as client, accept(self.upstream) as far:
                carry(client, far, b"there")
                carry(far, client, b"back")

    def status(self) -> dict[str, Any]:
        """What the status says."""
        return control.ask(self.control, "status")

    def troubles(self, rule: str) -> dict[str, dict[str, Any]]:
        """The names of a rule that have no good answer, as in the status."""
        (found,) = (one for one in self.status()["rules"] if one["name"] == rule)
        return {name["host"]: name for name in found["names"]}

    def wait_known(self, *rules: str) -> None:
        """Wait until all names of these rules are answered, and well."""
        for rule in rules:
            eventually(partial(self._is_known, rule), partial(self.troubles, rule))

    def _is_known(self, rule: str) -> bool:
        return not self.troubles(rule)

    def wait_failed(self, rule: str, host: str) -> None:
        """Wait until a name is known to have no good answer."""
        eventually(
            lambda: self.troubles(rule).get(host, {}).get("state") == "failed",
            lambda: str(self.troubles(rule)),
        )

    def helper(self) -> int:
        """The process that looks names up."""
        eventually(lambda: len(self.it.forwarder.helpers()) == 1)
        return self.it.forwarder.helpers()[0]

    def logged(self, pattern: str) -> int:
        """How many lines of the log are so."""
        return sum(bool(re.search(pattern, line)) for line in self.it.forwarder.lines)

    def stop(self) -> None:
        """It stops as it should."""
        assert self.it.forwarder.stop() == 0
