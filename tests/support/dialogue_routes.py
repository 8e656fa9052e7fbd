"""Ways for dialogues: direct ones, and through a forwarder in every way it can move bytes."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.control import ask
from support.dialogue_driver import Route
from support.dialogues import Carrier
from support.ends import listen, listen_unix, written
from support.forwarder import Forwarder, Leaks, reserve_port
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TIMEOUTS = "half_close_timeout = 3600\nconnect_timeout = 60\n"
"""Out of the way: a wait that only a time-out ends is to be seen as one."""

RULES = {
    "tcp": (False, False, ""),
    "unix-in": (True, False, ""),
    "unix-out": (False, True, ""),
    "unix": (True, True, ""),
    "metered": (False, False, 'bandwidth = "50MB"'),
    "tight": (False, False, "rcvbuf = 16384\nsndbuf = 16384"),
}
"""By name: whether clients and upstream are at unix sockets, and more of the rule."""


@dataclass
class Site:
    """A running forwarder with a rule of each kind."""

    forwarder: Forwarder
    routes: list[Route]
    control: Path
    leaks: Leaks

    def nothing_is_left(self) -> None:
        """Wait until no session is open, and no descriptor that was not at the start."""
        eventually(lambda: self._sessions() == 0, lambda: f"{self._sessions()} sessions are left")
        self.leaks.check()

    def _sessions(self) -> object:
        totals = ask(self.control, "status")["totals"]
        assert isinstance(totals, dict)
        return totals["sessions"]


@contextmanager
def direct_routes(directory: Path) -> Iterator[dict[bool, Route]]:
    """Ways without anything between; that over a unix socket is ``[True]``."""
    with listen() as tcp, listen_unix(str(directory / "direct.sock")) as unix:
        yield {
            False: Route(Carrier("direct"), tcp.getsockname()[:2], tcp),
            True: Route(Carrier("direct-unix", (True, True)), unix.getsockname(), unix),
        }


@contextmanager
def forwarder_site(directory: Path, relay: str, workers: int = 2) -> Iterator[Site]:
    """Start the command; the directory must be empty."""
    with ExitStack() as stack:
        control = directory / "control.sock"
        text = f'relay = "{relay}"\nworkers = {workers}\ncontrol = "{control}"\n{_TIMEOUTS}'
        routes = []
        for name, (unix_in, unix_out, more) in RULES.items():
            carrier = Carrier(f"{relay}-{name}", (unix_in, unix_out))
            route = open_route(stack, directory / name, carrier)
            routes.append(route)
            text += f'[[forwarding_rules]]\nlisten = "{written(route.address)}"\n'
            text += f'upstream = "{written(route.upstream())}"\n{more}\n'
        path = directory / "dialogues.toml"
        path.write_text(text)
        forwarder = Forwarder(["-c", str(path)])
        try:
            yield Site(forwarder, routes, control, Leaks(forwarder))
        finally:
            if forwarder.process.returncode is None:
                forwarder.kill()


def open_route(stack: ExitStack, path: Path, carrier: Carrier) -> Route:
    """An address for clients that nobody else has, and a listener, as the carrier's sides are."""
    unix_in, unix_out = carrier.unix
    address: tuple[str, int] | str = f"{path}.in"
    if not unix_in:
        address = stack.enter_context(reserve_port()).getsockname()[:2]
    listener = stack.enter_context(listen_unix(f"{path}.out") if unix_out else listen())
    return Route(carrier, address, listener)
