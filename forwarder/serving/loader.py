"""Reading a configuration in a process of its own, so that the master never blocks or dies of it.

Parsing ten thousand rules takes a second and a file system can take many; meanwhile the master must
answer signals. What the child found comes back over a pipe. Applies nothing.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from forwarder.errors import ForwarderError
from forwarder.serving.addresses import bind_addresses
from forwarder.system.children import keep_only
from forwarder.system.signals import leave_to_the_master
from forwarder.upstream.lookup import look_up_all
from forwarder.upstream.wanted import listening_names

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Mapping

    from forwarder.config.model import Config
    from forwarder.serving.addresses import BindAddress
    from forwarder.upstream.answers import Answer

# A configuration that takes longer (a dead name server, a dead network file system) is given up.
LOAD_TIMEOUT_S: Final = 60.0
# New names to listen on have this long to be answered; after that their rules wait.
LOOK_UP_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that can be applied, with the addresses its rules listen on.

    ``unresolved``: why rules have no address now, by name. ``answers``: the answers for names to
    listen on that were not known before.
    """

    config: Config
    binds: dict[str, tuple[BindAddress, ...]]
    unresolved: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a configuration cannot be applied: one line per problem."""

    problems: tuple[str, ...]


class Loading:
    """A child process that reads the configuration. Owns the read end of its pipe."""

    def __init__(
        self,
        load: Callable[[], Candidate],
        kept: Collection[int],
        now: float,
    ) -> None:
        """Fork, and call ``load`` in the child, which keeps the descriptors ``kept``.

        Raises OSError.
        """
        self.deadline = now + LOAD_TIMEOUT_S
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        self._received = bytearray()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self._read_fd)
            os.close(write_fd)
            raise
        if self.pid == 0:
            try:
                keep_only([write_fd, *kept])
                leave_to_the_master(but=(signal.SIGCHLD,))
                _write_all(write_fd, pickle.dumps(_load(load)))
            finally:
                os._exit(0)
        os.close(write_fd)
        os.set_blocking(self._read_fd, False)

    def fileno(self) -> int:
        """Readable when the child has sent something or has ended."""
        return self._read_fd

    def result(self) -> Candidate | Rejected | None:
        """What the child found; None while it is still at it. Never blocks."""
        while True:
            try:
                part = os.read(self._read_fd, 1 << 16)
            except BlockingIOError:
                return None
            if not part:
                break
            self._received += part
        died = Rejected(("the process that reads the configuration died",))
        try:
            found = pickle.loads(self._received)  # noqa: S301 - from our own forked child
        except (EOFError, pickle.UnpicklingError, ValueError):  # it died while it answered
            return died
        return found if isinstance(found, Candidate | Rejected) else died

    def cancel(self) -> None:
        """End the child, which has not come to a result yet. The master reaps it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read_fd)


class Loader:
    """At most one :class:`Loading` at a time. Owns it; the selector reports its answer."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        kept: Collection[int],
        on_found: Callable[[Candidate | Rejected], None],
        too_long: str,
    ) -> None:
        """``kept`` as for Loading. ``on_found`` gets what was found, or that it took too long.

        The selector's data is a function to call when there is something to read.
        """
        self._selector = selector
        self._kept = kept
        self._on_found = on_found
        self._too_long = too_long
        self._loading: Loading | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether something is being read."""
        return self._loading is not None

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return None if self._loading is None else self._loading.deadline

    def start(self, load: Callable[[], Candidate], now: float) -> None:
        """Begin, as Loading does, when nothing is under way. Raises OSError."""
        loading = Loading(load, self._kept, now)
        try:
            self._selector.register(loading, selectors.EVENT_READ, self._hear)
        except OSError:
            loading.cancel()
            loading.close()
            raise
        self._loading = loading

    def turn(self, now: float) -> None:
        """Give up what takes too long."""
        if self._loading is not None and now >= self._loading.deadline:
            self.cancel()
            self._on_found(Rejected((self._too_long,)))

    def cancel(self) -> None:
        """Give up what is under way, without a report."""
        if self._loading is not None:
            self._loading.cancel()
            self._end()

    def close(self) -> None:
        """Close the pipe."""
        if self._loading is not None:
            self._loading.close()
            self._loading = None

    def _hear(self) -> None:
        found = self._loading.result() if self._loading is not None else None
        if found is not None:
            self._end()
            self._on_found(found)

    def _end(self) -> None:
        if self._loading is not None:
            self._selector.unregister(self._loading)
            self.close()


def _load(load: Callable[[], Candidate]) -> Candidate | Rejected:
    try:
        return load()
    except ForwarderError as err:
        return Rejected(tuple(str(err).splitlines()))
    except Exception as err:  # noqa: BLE001 - a bug in reading must not pass for a dead child
        return Rejected((f"internal error: {err!r}",))


def look_up(config: Config, known: Mapping[str, Answer], patient: Container[str] = ()) -> Candidate:
    """Find where the rules of a configuration listen, looking up names that are not ``known``.

    ``patient`` as for ``bind_addresses``. Blocks LOOK_UP_S at most. Raises ForwarderError, as for a
    name that does not exist.
    """
    asked = listening_names(config.rules).keys() - known.keys()
    answers = look_up_all(asked, LOOK_UP_S) if asked else {}
    unresolved: dict[str, str] = {}
    binds = bind_addresses(config, {**known, **answers}, unresolved, patient=patient)
    return Candidate(config, binds, unresolved, answers)


def as_known(
    config: Config,
    known: Mapping[str, Answer],
    beside: Config | None = None,
    *,
    patient: Container[str],
) -> Candidate:
    """Find where the rules listen, without look-ups; the rest is as for ``bind_addresses``."""
    unresolved: dict[str, str] = {}
    binds = bind_addresses(config, known, unresolved, beside, patient)
    return Candidate(config, binds, unresolved)


def _write_all(fd: int, content: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(content)
