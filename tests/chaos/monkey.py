"""The monkey: carries acts out, and notes what they may cost whom."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from support import procfs

from chaos import config
from chaos.acts import Act, Deed
from chaos.model import Blow, Event
from chaos.place import ASK_S, ChaosError, is_alive, limit_descriptors, wait_until
from chaos.wire import PORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from chaos.place import Place

_PLENTY: Final = 1 << 20  # descriptors
_LONGEST_HANG_S: Final = config.HANG_S + 3.0  # nobody may be there to notice it


class Monkey:
    """Does acts one after the other; what takes time goes on beside the next ones."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._threads: list[threading.Thread] = []
        self.began = time.monotonic()
        self._rotations = 0
        self._is_over = threading.Event()
        self.events: list[Event] = []
        self.notes: list[str] = []
        self.ended: set[int] = set()  # workers that it has killed, or had killed
        self.problems: list[str] = []

    def run(self, acts: Iterable[Act], seconds: float) -> int:
        """Do what comes until the time is over. Returns how many acts that were."""
        until = time.monotonic() + seconds
        for count, act in enumerate(acts):
            if self._is_over.wait(max(0.0, min(act.pause_s, until - time.monotonic()))):
                return count
            if time.monotonic() >= until:
                return count
            self.note(f"{count}. {act}")
            self._do(act)
        return 0

    def note(self, text: str) -> None:
        """Something that happens now, for the report."""
        self.notes.append(f"{time.monotonic() - self.began:8.3f} {text}")

    def _do(self, act: Act) -> None:
        deeds: dict[Deed, Callable[[Act], None]] = {
            Deed.RELOAD: self._reload,
            Deed.BAD_RELOAD: self._bad_reload,
            Deed.RESIZE: self._resize,
            Deed.UPGRADE: self._upgrade,
            Deed.MOVE: self._move,
            Deed.KILL_WORKER: self._kill_worker,
            Deed.STOP_WORKER: self._stop_worker,
            Deed.HANG_WORKER: self._hang_worker,
            Deed.RETIRE_WORKER: self._retire_worker,
            Deed.STOP_MASTER: self._stop_master,
            Deed.KILL_MASTER: self._kill_master,
            Deed.KILL_IN_UPGRADE: self._kill_in_upgrade,
            Deed.KILL_CHECKER: self._kill_checker,
            Deed.FILL_DISK: self._fill_disk,
            Deed.ROTATE: self._rotate,
            Deed.FEW_DESCRIPTORS: self._few_descriptors,
            Deed.FLOOD: self._flood,
            Deed.KILL_UPSTREAM: self._kill_upstream,
        }
        deeds[act.deed](act)

    # -- what takes time

    def _beside(self, what: Callable[[], None]) -> None:
        def run() -> None:
            try:
                what()
            except Exception as err:  # noqa: BLE001 - the run has to hear of it
                self.problems.append(f"the monkey: {err!r}")

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _ask(self, op: str, *, waits: bool, **more: object) -> None:
        def ask() -> None:
            try:
                answer: object = self._place.ask(op, ASK_S, **more)
            except (OSError, ValueError) as err:  # the master was killed, or is stopped
                answer = repr(err)
            self.note(f"   {op} {more}: {str(answer)[:200]}")

        if waits:
            ask()
        else:
            self._beside(ask)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            self.note(f"   {number.name} to {pid} ({procfs.title(pid) or 'gone'})")

    def _master(self) -> int:
        return self._place.serving()

    # -- configurations, workers and upgrades

    def _reload(self, act: Act) -> None:
        self._place.write(self._place.text(act.size % config.VARIANTS))
        if act.which < 0.3:
            self._signal(self._master(), signal.SIGHUP)
        else:
            self._ask("reload", waits=act.flag)

    def _bad_reload(self, act: Act) -> None:
        good = self._place.config.read_text()
        self._place.write(config.invalid(self._place.text(), act.size % config.VARIANTS))
        self._ask("reload", waits=True)
        self._place.write(good)

    def _resize(self, act: Act) -> None:
        wanted = 1 + act.size % config.MOST_WORKERS
        if act.which < 0.3:
            grows = not act.flag and len(self._place.workers()) < config.MOST_WORKERS
            self._signal(self._master(), signal.SIGTTIN if grows else signal.SIGTTOU)
        elif act.which < 0.5:
            self._place.write(self._place.text(workers=wanted))
            self._ask("reload", waits=act.flag)
        else:
            self._ask("workers", waits=act.flag, count=str(wanted))

    def _upgrade(self, act: Act) -> None:
        if act.which < 0.3:
            self._signal(self._master(), signal.SIGUSR2)
        else:
            self._ask("upgrade", waits=act.flag)

    def _move(self, act: Act) -> None:
        rule = config.RULES[int(act.which * len(config.RULES))]
        self._ask("move", waits=act.flag, rule=rule, slot=act.size % config.WORKERS)

    # -- workers

    def _choose(self, pids: Sequence[int], act: Act) -> int:
        return pids[int(act.which * len(pids))] if pids else 0

    def _kill_worker(self, act: Act) -> None:
        if pid := self._choose(self._place.workers(), act):
            since = time.monotonic()
            if act.flag:  # what it has is known exactly then
                self._signal(pid, signal.SIGSTOP)
            held = self._place.held_by(pid)
            self._signal(pid, signal.SIGKILL)
            self._dead(pid, since, held)

    def _dead(self, pid: int, since: float, held: frozenset[int]) -> None:
        wait_until(lambda: not is_alive(pid), f"worker {pid} dies")
        self.ended.add(pid)
        self.events.append(Event(Blow.DEATH, since, time.monotonic(), held))
        self.note(f"   worker {pid} is dead, with {len(held)} sessions")

    def _stop_worker(self, act: Act) -> None:
        self._suspend(act, act.for_s)

    def _hang_worker(self, act: Act) -> None:
        self._suspend(act, _LONGEST_HANG_S)

    def _suspend(self, act: Act, seconds: float) -> None:
        """Stop a worker. If it is killed meanwhile for that, it was its death."""
        pid = self._choose(self._place.workers(), act)
        if not pid:
            return
        since = time.monotonic()
        self._signal(pid, signal.SIGSTOP)
        held = self._place.held_by(pid)

        def resume() -> None:
            until = since + seconds
            while is_alive(pid) and time.monotonic() < until and not self._is_over.wait(0.02):
                pass
            if is_alive(pid):
                self._signal(pid, signal.SIGCONT)
                time.sleep(0.05)  # a signal that was sent while it was stopped comes first
            if not is_alive(pid):
                self._dead(pid, since, held)

        self._beside(resume)

    def _retire_worker(self, act: Act) -> None:
        pid = self._choose(self._place.workers(), act)
        self.ended.add(pid)  # one that has just been born dies of it
        self._signal(pid, signal.SIGTERM)

    # -- masters

    def _stop_master(self, act: Act) -> None:
        pid = self._choose(self._place.masters(), act)
        self._signal(pid, signal.SIGSTOP)

        def resume() -> None:
            self._is_over.wait(act.for_s)
            self._signal(pid, signal.SIGCONT)

        self._beside(resume)

    def _kill_master(self, act: Act) -> None:
        if pid := self._master():
            since = time.monotonic()
            self._signal(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(pid), f"master {pid} dies")
            time.sleep(act.for_s if act.flag else 0)
            self._serve(since)

    def _serve(self, since: float) -> None:
        master = self._place.serve()
        self.events.append(Event(Blow.MASTER, since, time.monotonic()))
        self.note(f"   {master} serves")

    def _kill_in_upgrade(self, act: Act) -> None:
        old = self._master()
        since = time.monotonic()
        self._ask("upgrade", waits=False)
        time.sleep(act.for_s / 2)
        others = [pid for pid in self._place.masters() if pid != old]
        self._signal(old if act.flag or not others else others[-1], signal.SIGKILL)
        self._serve(since)

    def _kill_checker(self, act: Act) -> None:
        self._signal(self._choose(self._place.checkers(), act), signal.SIGKILL)

    # -- surroundings

    def _fill_disk(self, act: Act) -> None:
        since = time.monotonic()
        self._place.fill_disk()

        def empty() -> None:
            self._is_over.wait(act.for_s)
            self._place.empty_disk()
            self.events.append(Event(Blow.DISK, since, time.monotonic()))

        self._beside(empty)

    def _rotate(self, _: Act) -> None:
        self._rotations += 1
        if self._place.log.exists():
            self._place.log.rename(self._place.log.with_suffix(f".{self._rotations}"))
        self._signal(self._master(), signal.SIGUSR1)

    def _few_descriptors(self, act: Act) -> None:
        pids = [self._master()] if act.flag else self._place.workers()
        pid = self._choose(pids, act)
        if not pid:
            return
        since = time.monotonic()
        with suppress(OSError):
            limit_descriptors([pid], len(procfs.descriptors(pid)) + act.size)
        self.note(f"   {act.size} more descriptors for {pid} ({procfs.title(pid)})")

        def raise_again() -> None:
            self._is_over.wait(act.for_s)
            # What was forked or executed meanwhile has inherited it.
            limit_descriptors(self._place.pids(), _PLENTY)
            event = Event(Blow.DESCRIPTORS, since, time.monotonic(), of_master=act.flag)
            self.events.append(event)

        self._beside(raise_again)

    def _flood(self, act: Act) -> None:
        def flood() -> None:
            lot = random.Random(act.size)
            until = time.monotonic() + act.for_s
            with suppress(OSError):
                while time.monotonic() < until:
                    self._junk(lot)

        for _ in range(4):
            self._beside(flood)

    def _junk(self, lot: random.Random) -> None:
        """Clients that say nonsense, or nothing, or do not listen."""
        said = (
            b"",
            b"{",
            b'{"op": "status"}\n' * 50,
            lot.randbytes(3000),
            b"[1]\n",
            b'{"op": 7}\n',
        )
        socks = []
        try:
            for _ in range(30):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                socks.append(sock)
                sock.settimeout(0.2)
                sock.connect(str(self._place.control))
                with suppress(OSError):
                    sock.sendall(lot.choice(said))
        finally:
            for sock in socks:
                sock.close()

    def _kill_upstream(self, act: Act) -> None:
        if self._place.victim.process.poll() is not None:
            return
        since = time.monotonic()
        self._place.victim.kill()

        def start() -> None:
            self._is_over.wait(act.for_s)
            self._place.start_victim()
            self.events.append(Event(Blow.UPSTREAM, since, time.monotonic(), port=PORTS.victim))

        self._beside(start)

    # -- the end

    def settle(self) -> None:
        """Undo everything. Result: the first configuration, as many workers, one master."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)
            if thread.is_alive():
                raise ChaosError("the monkey does not come to its end")
        self.note("settles")
        self._place.write(self._place.text())
        self._place.serve()
        wait_until(self._is_reloaded, "a reload succeeds again")
        self._place.fill_slots()
        self.note("has settled")

    def _is_reloaded(self) -> bool:
        with suppress(OSError, ValueError):
            answer = self._place.ask("reload")
            self.note(f"   reload: {str(answer)[:200]}")
            return answer.get("ok") is True
        return False
