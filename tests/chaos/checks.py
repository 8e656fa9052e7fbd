"""What must hold at the end of a run."""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from support import procfs, sockdiag

from chaos import config, model
from chaos.clients import HANG_S
from chaos.model import Ending, Loss
from chaos.place import ChaosError, wait_until
from chaos.wire import (
    GREETING,
    HEAD,
    MAGIC,
    MOST_LIMITED,
    PORTS,
    TRAILER_BYTES,
    Mode,
    address_of,
    number_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chaos.model import Ability, Event
    from chaos.place import Place

# A bug, whatever else happens.
_BUGS: Final = re.compile(
    r"Traceback|[a-z]\.bug|\.nonsense|\.crashed|never retrieved|internal error|Exception ignored"
)
_DIED: Final = re.compile(r"worker\.(?:died|hung)\b.*?pid=(\d+)")
_IDLE_S: Final = 2.0
_IDLE_SHARE: Final = 0.15  # of a processor; one that spins has much more, beside others too
_GROWTH_KIB: Final = 12 * 1024  # what a process may have grown: buffers, and lists that stay
_GONE_S: Final = 20.0  # each within 2 s, on a machine that is not busy
_CHECKED: Final = 20  # of each kind of problem, so many are said
_REASON_LOST: Final = "us/lost"


@dataclass(frozen=True)
class Level:
    """What the processes of an idle instance have: descriptors by kind, and memory."""

    descriptors: Mapping[str, Counter[str]]
    memory_kib: Mapping[str, int]

    @classmethod
    def at_rest(cls, place: Place) -> Level:
        """As soon as it stays the same: who has just asked may still have a connection open."""
        before = cls.of(place)
        while True:
            time.sleep(0.3)
            now = cls.of(place)
            if now.descriptors == before.descriptors:
                return now
            before = now

    @classmethod
    def of(cls, place: Place) -> Level:
        """The instance as it is: of workers, the most that any of them has."""
        descriptors: dict[str, Counter[str]] = {}
        memory: dict[str, int] = {}
        for role, pids in _roles(place).items():
            each = [Counter(procfs.without_pipes(pid)) for pid in pids]
            descriptors[role] = Counter()
            for one in each:
                descriptors[role] |= one
            memory[role] = max(map(procfs.resident_kib, pids))
        return cls(descriptors, memory)

    def differences(self, later: Level) -> list[str]:
        """What is more now, or less."""
        problems = []
        for role, before in self.descriptors.items():
            now = later.descriptors.get(role, Counter())
            if now != before:
                more, less = dict(now - before), dict(before - now)
                problems.append(f"descriptors of the {role}: {more} more, {less} less")
            growth = later.memory_kib.get(role, 0) - self.memory_kib[role]
            if growth > _GROWTH_KIB:
                problems.append(f"memory of the {role}: {growth} KiB more")
        return problems


def _roles(place: Place) -> dict[str, list[int]]:
    return {
        "master": place.masters(),
        "worker": place.workers(),
        "checker": place.checkers(),
    }


def look_for_old_ones(place: Place) -> list[str]:
    """Old instances, orphans and retired workers go, though sessions go on."""

    def have_gone() -> bool:
        roles = _roles(place)
        return len(roles["master"]) == 1 and len(roles["worker"]) == config.WORKERS

    try:
        wait_until(have_gone, "", _GONE_S)
    except ChaosError:
        return [f"old processes stay: {place.describe()}"]
    return []


def wait_for_rest(place: Place) -> None:
    """Until nothing is open any more, and the old processes have gone. Raises ChaosError."""

    def is_at_rest() -> bool:
        with suppress(OSError, ValueError):
            status = place.ask("status")
            totals, workers = status["totals"], status["workers"]
            assert isinstance(totals, dict)
            assert isinstance(workers, list)
            one_each = [len(pids) for pids in _roles(place).values()] == [1, config.WORKERS, 1]
            is_ready = [one["state"] for one in workers] == ["ready"] * config.WORKERS
            return totals["sessions"] == 0 and one_each and is_ready and not status["predecessors"]
        return False

    try:
        wait_until(is_at_rest, "")
    except ChaosError:
        status = place.ask("status")
        found = {key: status[key] for key in ("totals", "predecessors", "workers")}
        open_now = place.ask("sessions", limit=20)["sessions"]
        raise ChaosError(f"no rest: {place.describe()}, {found}, sessions {open_now}") from None


def look_at_processes(place: Place, before: Level) -> list[str]:
    """Descriptors, memory, half-closed sockets, and whether they sleep."""
    problems: list[str] = []
    with suppress(ChaosError):
        wait_until(lambda: not before.differences(Level.of(place)), "", 15)
    problems += before.differences(Level.of(place))
    problems += [
        f"CLOSE_WAIT in {procfs.title(pid)}"
        for pid in place.pids()
        if sockdiag.CLOSE_WAIT in sockdiag.states(pid)
    ]
    used = {pid: procfs.cpu_s(pid) for pid in place.pids()}
    time.sleep(_IDLE_S)
    for pid, before_s in used.items():
        share = (procfs.cpu_s(pid) - before_s) / _IDLE_S
        if share > _IDLE_SHARE:
            problems.append(f"{procfs.title(pid)} takes {share:.0%} of a processor, and is idle")
    if count := place.upstream_connections():
        problems.append(f"{count} connections are open at the upstreams")
    return problems


def look_at_gauges(place: Place) -> list[str]:
    """What is open is counted as 0, and each session and client has had one reason."""
    status = place.ask("status")
    problems = []
    rules, groups = status["rules"], status["groups"]
    assert isinstance(rules, list)
    assert isinstance(groups, list)
    for rule in rules:
        begun = rule["sessions_total"] + rule["refused"] + rule.get("moved_in", 0)
        if rule["sessions"] or sum(rule["ends"].values()) + rule.get("moved_out", 0) != begun:
            problems.append(f"rule {rule['name']}: {rule}")
    problems += [
        f"group: {group}"
        for group in groups
        if group["waiting"] or any(server["sessions"] for server in group["servers"])
    ]
    return problems


def look_at_log(
    place: Place, endings: Sequence[Ending], events: Sequence[Event]
) -> tuple[list[str], frozenset[int]]:
    """Whole lines, one for each session, and with its bytes.

    Returns what is wrong, and which sessions were recognised as lost by a worker's death.
    """
    problems: list[str] = []
    by_number: dict[int, list[dict[str, object]]] = {}
    for path in sorted(place.disk.glob("sessions.*")):
        for entry in _read_lines(path, problems):
            if entry.get("event") == "ended":
                by_number.setdefault(number_of(str(entry["client"])), []).append(entry)
    for ending in endings:
        entries = by_number.get(ending.number, [])
        if problem := _line_problem(ending, entries, events):
            problems.append(problem)
    recognised = frozenset(
        number
        for number, entries in by_number.items()
        if any(entry["end"] == _REASON_LOST for entry in entries)
    )
    return problems, recognised


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, object]]:
    found = []
    text = path.read_bytes().decode(errors="replace")
    if text and not text.endswith("\n"):
        problems.append(f"the log {path.name} ends amid a line: {text[-200:]!r}")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.append({**entry, "client": entry["client"], "end": entry["end"]})
        except (ValueError, KeyError, TypeError) as err:
            problems.append(f"a line of the log {path.name}: {err!r}: {line[:300]!r}")
    return found


def _line_problem(
    ending: Ending, entries: Sequence[dict[str, object]], events: Sequence[Event]
) -> str:
    if ending.kind in model.NAMELESS_KINDS | model.DATAGRAM_KINDS:
        return ""
    if len(entries) > 1:
        return f"{len(entries)} lines in the log of {ending}: {entries}"
    if ending.outcome != model.OK:
        return ""
    if not entries:
        return "" if model.may_lack_its_line(ending, events) else f"no line in the log of {ending}"
    entry = entries[0]
    if ending.kind in model.RESET_KINDS | {"tcptoudp"}:  # or counted in datagrams
        return ""
    own = ending.sent + HEAD.size, ending.received + GREETING.size
    if (entry["bytes_c2u"], entry["bytes_u2c"]) != own:
        return f"other bytes in the log of {ending}: {entry}"
    return ""


def look_at_endings(
    endings: Sequence[Ending],
    events: Sequence[Event],
    abilities: frozenset[Ability],
    recognised: frozenset[int],
) -> tuple[list[str], Counter[str]]:
    """What was lost without an excuse; and how often each excuse was needed."""
    problems: list[str] = []
    excuses: Counter[str] = Counter()
    few = [event for event in events if event.blow is model.Blow.DESCRIPTORS]
    masters = [event for event in events if event.blow is model.Blow.MASTER]
    for ending in endings:
        if ending.outcome not in {model.OK, model.TURNED_AWAY}:
            loss = Loss(ending, ending.number in recognised, few, masters)
            why = model.why_lost(loss, events, abilities)
            if why:
                excuses[f"{ending.kind}: {why}"] += 1
            else:
                problems.append(f"lost: {ending}")
        if missing := model.lost_without_excuse(ending, events):
            problems.append(f"{len(missing)} datagrams lost, sent at {missing[:5]}: {ending}")
        elif ending.lost:
            excuses[f"{ending.kind}: datagrams"] += len(ending.lost)
    return problems, excuses


def look_at_own_log(place: Place, ended: set[int]) -> list[str]:
    """Bugs that the program has reported, and workers that died of themselves."""
    problems = []
    for line in place.said():
        died = _DIED.search(line)
        if _BUGS.search(line) or (died and int(died[1]) not in ended):
            problems.append(f"said: {line}")
    return problems


def look_at_counters(place: Place, first: int) -> list[str]:
    """Some sessions more, which are counted exactly; and the limit lets in as many as it says.

    ``first`` is the number of the first client: nobody has used it, nor those after it.
    """
    before = _totals(place)
    with ExitStack() as stack:
        socks = [
            stack.enter_context(_greeted(first + number, PORTS.limited))
            for number in range(MOST_LIMITED)
        ]
        try:
            stack.enter_context(_greeted(first + MOST_LIMITED, PORTS.limited))
        except OSError:
            pass
        else:
            return [f"a limit of {MOST_LIMITED} lets in more"]
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    count = MOST_LIMITED
    wanted = {
        "sessions": 0,
        "sessions_total": count,
        "refused": 1,
        "bytes_c2u": count * HEAD.size,
        "bytes_u2c": count * (GREETING.size + TRAILER_BYTES),
    }

    def changes() -> dict[str, int]:
        now = _totals(place)
        return {key: now[key] - before[key] for key in wanted}

    with suppress(ChaosError):
        wait_until(lambda: changes() == wanted, "", 10)
    return [] if changes() == wanted else [f"counters: {changes()}, should be {wanted}"]


def _totals(place: Place) -> dict[str, int]:
    totals = place.ask("status")["totals"]
    assert isinstance(totals, dict)
    return {key: int(value) for key, value in totals.items()}


def _greeted(number: int, port: int) -> socket.socket:
    """A session that has been answered. Raises OSError if it is turned away."""
    sock = socket.socket()
    try:
        sock.settimeout(HANG_S)
        sock.bind((address_of(number), 0))
        sock.connect(("127.0.0.1", port))
        sock.sendall(HEAD.pack(MAGIC, number, Mode.ECHO, 0, 0))
        if len(sock.recv(GREETING.size)) != GREETING.size:
            raise ConnectionAbortedError("an end in place of a greeting")  # noqa: TRY301
    except BaseException:
        sock.close()
        raise
    return sock


def shortened(problems: Sequence[str]) -> list[str]:
    """The first ones, and how many more."""
    rest = len(problems) - _CHECKED
    return [*problems[:_CHECKED], *([f"and {rest} more"] if rest > 0 else [])]
