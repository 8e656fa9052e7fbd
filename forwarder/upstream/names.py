"""The names of one worker: their addresses, found by another process, and who is waiting.

Asks no name server. An answer stays in use until there is another one with addresses, so a name
server that is down changes nothing for names that had an address once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from forwarder.net.sockets import Target, with_port
from forwarder.upstream.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

log = logging.getLogger(__name__)

# How often a worker asks for a name to be looked up before its time. Arbitrary; sessions that find
# no upstream may fail by the thousand.
REFRESH_S: Final = 1.0


class _Name:
    """What is known of one host. ``targets`` has what was asked for, by port."""

    __slots__ = ("answer", "targets")

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.targets: dict[int, tuple[Target, ...]] = {}

    def at(self, port: int) -> tuple[Target, ...]:
        """The addresses with a port; made once, since sessions ask again and again."""
        found = self.targets.get(port)
        if found is None:
            found = self.targets[port] = tuple(
                Target(address.family, with_port(address.sockaddr, port))
                for address in self.answer.addresses
            )
        return found


class Names:
    """The table of names that the pools of a worker read.

    ``revision`` grows when the addresses of a name change.
    """

    def __init__(self, ask: Callable[[str], None], clock: Callable[[], float]) -> None:
        """``ask`` is called with a name that is to be looked up soon; ``clock`` gives seconds."""
        self.revision = 0
        self._ask = ask
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._asked_at: dict[str, float] = {}
        self._waiting: dict[str, list[_Waiter]] = {}

    def at(self, host: str, port: int) -> tuple[Target, ...] | None:
        """The last known addresses; empty if there are none, None if there was no answer yet."""
        name = self._names.get(host)
        return None if name is None else name.at(port)

    def why(self, host: str) -> str:
        """Why the last look-up of a name found nothing; "" if it found some, or there was none."""
        name = self._names.get(host)
        return "" if name is None else name.answer.why

    def refresh(self, host: str) -> None:
        """Ask for a look-up of a name before its time, every REFRESH_S at most."""
        now = self._clock()
        if now >= self._asked_at.get(host, -REFRESH_S) + REFRESH_S:
            self._asked_at[host] = now
            self._ask(host)

    def wait(self, hosts: Iterable[str], attempt: Callable[[], bool]) -> None:
        """Call ``attempt`` after each answer about one of ``hosts``, until it returns True."""
        waiter = _Waiter(attempt)
        for host in hosts:
            self._waiting.setdefault(host, []).append(waiter)

    def update(self, answers: Mapping[str, Answer]) -> None:
        """Take in answers, and wake the sessions that wait for them."""
        for host, answer in answers.items():
            known = self._names.get(host)
            if known is None or known.answer.addresses != answer.addresses:
                self._names[host] = _Name(answer)
                self.revision += 1
            else:
                known.answer = answer
        for host in answers:
            self._wake(host)

    def keep(self, hosts: Collection[str]) -> None:
        """Forget all names but these; sessions do not go on waiting for another one."""
        gone = self._waiting.keys() - hosts
        self.update({host: Answer((), "no rule leads there any more") for host in gone})
        for table in (self._names, self._asked_at, self._waiting):
            for host in table.keys() - hosts:
                del table[host]

    def _wake(self, host: str) -> None:
        waiting = self._waiting.pop(host, ())
        left = [waiter for waiter in waiting if not waiter.is_done and not waiter.try_again()]
        if left:
            self._waiting[host] = [*left, *self._waiting.get(host, ())]


class _Waiter:
    """An attempt that waits for names, listed at each; done when one of them was enough."""

    __slots__ = ("attempt", "is_done")

    def __init__(self, attempt: Callable[[], bool]) -> None:
        self.attempt = attempt
        self.is_done = False

    def try_again(self) -> bool:
        """Whether the wait is over."""
        try:
            self.is_done = self.attempt()
        except Exception:  # a bug must cost one session, not all that wait for the name
            log.exception("resolve.bug")
            self.is_done = True
        return self.is_done
