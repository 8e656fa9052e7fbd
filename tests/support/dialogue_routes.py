"""Ways for dialogues: direct ones, and through a forwarder in every way it can move bytes."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from support.control import ask
from support.dialogue_driver import Route
from support.dialogues import Carrier
from support.ends import listen, listen_unix, written
from support.forwarder import Forwarder, Leaks, reserve_port
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_TIMEOUTS = "half_close_timeout = 3600\nconnect_timeout = 60\ndrain_timeout = 0\n"
"""Out of the way: a wait that only a time-out ends is to be seen as one."""

_METERED = 'bandwidth = "50MB"'
_SMALL = "rcvbuf = 16384\nsndbuf = 16384"
RULES = {
    "tcp": (False, False, ""),
    "unix-in": (True, False, ""),
    "unix-out": (False, True, ""),
    "unix": (True, True, ""),
    "metered": (False, False, _METERED),
    "tight": (False, False, _SMALL),
}
"""By name: whether clients and upstream are at unix sockets, and more of the rule."""
_OTHERWISE = {"tcp": _METERED, "unix-in": _METERED, "unix-out": _METERED, "unix": "", "metered": ""}
"""What they have more in every other turn: bandwidth that comes and goes under open sessions."""


class Site:
    """A running forwarder with a rule of each kind. Made with an empty directory."""

    def __init__(self, directory: Path, relay: str, stack: ExitStack) -> None:
        self.relay = relay
        self.control = directory / "control.sock"
        self.config = directory / "dialogues.toml"
        carriers = [Carrier(f"{relay}-{name}", rule[:2]) for name, rule in RULES.items()]
        self.routes = [open_route(stack, directory / one.name, one) for one in carriers]
        self.write(0)
        self.forwarder = Forwarder(["-c", str(self.config), "--control", str(self.control)])
        self.leaks = Leaks(self.forwarder)

    def write(self, turn: int) -> None:
        """Write the configuration; in odd turns other rules have a bandwidth than in even ones."""
        self.config.write_text(written_rules(self.relay, self.routes, turn))

    def sessions(self) -> object:
        """How many are open, in all workers."""
        totals = ask(self.control, "status")["totals"]
        assert isinstance(totals, dict)
        return totals["sessions"]

    def nothing_is_left(self) -> None:
        """Wait until no session is open, and no descriptor that was not at the start."""
        eventually(lambda: self.sessions() == 0, lambda: f"{self.sessions()} sessions are left")
        self.leaks.check()


def written_rules(relay: str, routes: Iterable[Route], turn: int) -> str:
    """A configuration with a rule of each kind; see :meth:`Site.write`."""
    text = f'relay = "{relay}"\nworkers = 2\n{_TIMEOUTS}'
    for route, (name, rule) in zip(routes, RULES.items(), strict=True):
        more = rule[2] if turn % 2 == 0 or name == "tight" else _OTHERWISE[name]
        text += f'[[forwarding_rules]]\nlisten = "{written(route.address)}"\n'
        text += f'upstream = "{written(route.upstream())}"\n{more}\n'
    return text


@contextmanager
def direct_routes(directory: Path) -> Iterator[dict[bool, Route]]:
    """Ways without anything between; that over a unix socket is ``[True]``."""
    with listen() as tcp, listen_unix(str(directory / "direct.sock")) as unix:
        yield {
            False: Route(Carrier("direct"), tcp.getsockname()[:2], tcp),
            True: Route(Carrier("direct-unix", (True, True)), unix.getsockname(), unix),
        }


@contextmanager
def forwarder_site(directory: Path, relay: str) -> Iterator[Site]:
    """Start the command; the directory must be empty. It is killed if it still runs at the end."""
    with ExitStack() as stack:
        site = Site(directory, relay, stack)
        try:
            yield site
        finally:
            if site.forwarder.process.returncode is None:
                site.forwarder.kill()


def open_route(stack: ExitStack, path: Path, carrier: Carrier) -> Route:
    """An address for clients that nobody else has, and a listener, as the carrier's sides are."""
    unix_in, unix_out = carrier.unix
    address: tuple[str, int] | str = f"{path}.in"
    if not unix_in:
        address = stack.enter_context(reserve_port()).getsockname()[:2]
    listener = stack.enter_context(listen_unix(f"{path}.out") if unix_out else listen())
    return Route(carrier, address, listener)
