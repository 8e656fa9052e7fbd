"""What clients of the control socket may ask for, and which of them wait for an answer.

A reload and a change of the number of workers are answered when they are over: every worker has
acknowledged, or nothing was changed. An upgrade is answered when the successor serves or has
failed, a stop when all workers have gone.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from forwarder.config.model import MAX_WEIGHT
from forwarder.config.patterns import parse_pattern
from forwarder.control import path as control_path
from forwarder.control.orders import Action, Wanted, is_weight
from forwarder.control.protocol import MAX_LISTED, MAX_LOGIN, REJECTED
from forwarder.control.server import ControlServer, refusal
from forwarder.ipc.messages import Op

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Iterable

    from forwarder.control.server import Message, Reply
    from forwarder.ipc.questions import Answered

log = logging.getLogger(__name__)

OPERATIONS: Final = (
    "kill",
    "move",
    "preview",
    "reload",
    "sessions",
    "status",
    "stop",
    "upgrade",
    "upstream",
    "upstreams",
    "workers",
)
LOOK_S: Final = 1.0  # how often to see whether the name of the default place is free
MAX_COUNT: Final = 1 << 32  # no worker has that many sessions
STOPPING: Final = "the forwarder is stopping"
UNDER_WAY: Final = "an upgrade is under way; ask the new one when it serves"
# What sessions may be chosen by; those that meet each one that is given.
CONDITIONS: Final = ("ids", "rule", "client", "group", "server")
# A question to the workers has to fit into a message to each of them.
MAX_CHOICE_BYTES: Final = 24 * 1024
_COUNT: Final = re.compile(r"[+-]?[0-9]{1,4}")


Preview: TypeAlias = "Callable[[Message, Reply], None]"


class Instance(Protocol):
    """The master, as far as clients can ask something of it."""

    def status(self) -> Message:
        """Describe the instance."""

    def ask_sessions(self, op: Op, choice: Message, callback: Answered) -> None:
        """Let the workers list (LIST) or end (KILL) some of their sessions.

        Called back with a list or a count of each.
        """

    def move_sessions(self, choice: Message, slot: int, reply: Reply) -> str:
        """Move some sessions to the worker of a slot. Returns why not; "": it is answered."""

    def reload(self) -> str:
        """Begin a reload. Returns why not, or ""."""

    def describe_upstreams(self, only: str | None) -> list[Message]:
        """Describe the groups of upstreams with their servers, all or ``only`` this one."""

    def order(self, wanted: Wanted, uid: int, reply: Reply) -> str:
        """Carry out an order of a user about some servers. Returns why not; "": it is answered."""

    def resize(self, size: int) -> str:
        """Begin to change to ``size`` workers. Returns why not, or ""."""

    def upgrade(self) -> str:
        """Begin an upgrade, unless one is under way. Returns why not, or ""."""

    def stop(self) -> None:
        """Begin to stop, or hurry a stop that has begun."""

    @property
    def size(self) -> int:
        """How many workers are wanted."""


def new_size(text: str, size: int) -> int | None:
    """The number of workers that ``+1``, ``-1`` or ``N`` asks for; None if it is none of these."""
    if not text.isascii() or not _COUNT.fullmatch(text):
        return None
    return size + int(text) if text[0] in "+-" else int(text)


def read_choice(message: Message) -> tuple[Message, int]:
    """Which sessions a client asks for, see CONDITIONS, and how many. Raises ValueError."""
    choice: Message = {key: message.get(key) for key in CONDITIONS}
    ids, client = choice["ids"], choice["client"]
    limit = message.get("limit", MAX_LISTED)
    if ids is not None and not (isinstance(ids, list) and all(isinstance(i, str) for i in ids)):
        raise ValueError("ids is a list of texts, as `forwarder sessions` shows them")
    for key in ("rule", "group", "server"):
        if not (choice[key] is None or isinstance(choice[key], str)):
            raise ValueError(f"{key} is the name of a {key}, a text")
    if not (client is None or isinstance(client, str)):
        raise ValueError("client is an address, a network or a text with * and ?")
    if isinstance(client, str):
        parse_pattern(client)  # its error is a ValueError that says what is wrong
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LISTED:
        raise ValueError(f"limit is a number from 1 to {MAX_LISTED}")
    if len(json.dumps(choice)) > MAX_CHOICE_BYTES:
        raise ValueError(f"the conditions have more than {MAX_CHOICE_BYTES} bytes together")
    return choice, limit


def read_slot(message: Message) -> int:
    """To which worker sessions shall be moved. Raises ValueError."""
    slot = message.get("slot")
    if not isinstance(slot, int) or isinstance(slot, bool) or slot < 0:
        raise ValueError("slot is the number of a worker, as `forwarder status` shows it")
    return slot


def read_order(message: Message) -> Wanted:
    """What a client orders of which servers. Raises ValueError."""
    what, group, servers = (message.get(key) for key in ("what", "group", "servers"))
    cuts, weight = message.get("reset", False), message.get("weight")
    actions = [one.value for one in Action]
    if what not in actions:
        raise ValueError(f"what is one of {', '.join(actions)}")
    if not (isinstance(group, str) and group):
        raise ValueError("group is the name of a group, a text")
    names = servers if isinstance(servers, list) else []
    if not names or not all(isinstance(one, str) and one for one in names):
        raise ValueError("servers is a list of texts, as `forwarder upstream list` shows them")
    login = message.get("login") or ""
    if not (isinstance(login, str) and len(login) <= MAX_LOGIN and login.isprintable()):
        raise ValueError(f"login is a name of at most {MAX_LOGIN} characters")
    action = Action(what)
    if not isinstance(cuts, bool) or (cuts and action not in {Action.DRAIN, Action.DISABLE}):
        raise ValueError("reset is true or false, for drain and disable")
    if (action is Action.WEIGHT) != is_weight(weight):
        raise ValueError(f"weight is a number from 0 to {MAX_WEIGHT}, for weight alone")
    return Wanted(
        action=action,
        group=group,
        servers=tuple(names),
        cuts=cuts,
        weight=weight if isinstance(weight, int) else None,
        login=login,
    )


def _listing(found: list[object], silent: list[int], limit: int) -> Message:
    """The answers of the workers, none of which is trusted."""
    parts = [part for part in found if isinstance(part, list)]
    sessions = [one for part in parts for one in part if isinstance(one, dict)]
    is_cut = len(sessions) > limit
    return {"ok": True, "sessions": sessions[:limit], "is_cut": is_cut, "silent": silent}


def _killed(found: list[object], silent: list[int]) -> Message:
    counts = [one for one in found if isinstance(one, int) and 0 <= one <= MAX_COUNT]
    return {"ok": True, "killed": sum(counts), "silent": silent}


class Requests:
    """Requests under way. The master reports their outcome by the ``on_`` methods.

    ::

        reload:  asked --> loading --> settling --> answered
        workers:                       settling --> answered
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._asked: list[Reply] = []
        self._loading: list[Reply] = []
        self._settling: list[tuple[Reply, Message]] = []
        self._upgrading: list[Reply] = []
        self._stopping: list[Reply] = []
        self._preview: Callable[[Message, Reply], None] = lambda _, reply: reply(
            refusal("nothing can be reloaded")
        )
        self._server: ControlServer | None = None
        self._is_beside = False  # another instance has the default place
        self._is_displaced = False  # a failed successor may have our place
        self._look_at = math.inf  # when to check whether one of these is free

    def preview_by(self, handler: Preview) -> None:
        """Let ``handler`` answer what a reload would change."""
        self._preview = handler

    # -- the socket

    def open(
        self, selector: selectors.BaseSelector, path: str | None, *, replaces: str | None
    ) -> None:
        """Listen at ``path``, else at the default place if there is one. Raises StartupError.

        ``replaces`` is the path of a predecessor, whose place is taken.
        """
        listener = control_path.listen(path, replaces=replaces)
        if listener is not None:
            self._server = ControlServer(listener, selector, self.handle)
            log.info("control: listening at %s", listener.path)
            has_default = listener.path.endswith(f"/{control_path.NAME}")
            self._is_beside = path is None and not has_default
            self._look_at = time.monotonic() + LOOK_S if self._is_beside else math.inf

    @property
    def path(self) -> str | None:
        """Where clients connect, if they can."""
        return None if self._server is None else self._server.path

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        if self._server is None:
            return None
        asked = self._server.deadline
        return min(self._look_at, math.inf if asked is None else asked)

    def turn(self, now: float) -> None:
        """Once per turn of the master: handle at most one request."""
        if self._server is not None:
            self._server.turn()
            if now >= self._look_at:
                self._look(self._server)

    def _look(self, server: ControlServer) -> None:
        """Take our own place again, or the name that another instance had, once it is free."""
        if self._is_displaced:
            self._is_displaced = not server.renew()
        elif self._is_beside:
            listener = control_path.take_default(server.path)
            if listener is not None:
                server.move(listener)
                self._is_beside = False
                log.info("control: listening at %s", listener.path)
        waits = self._is_displaced or self._is_beside
        self._look_at = time.monotonic() + LOOK_S if waits else math.inf

    def take_back(self) -> None:
        """Listen at our path again if a successor, which has failed, has taken it.

        If the kernel has not closed the successor's socket yet, a while later.
        """
        if self._server is not None:
            self._is_displaced = True
            self._look(self._server)

    def close(self) -> None:
        """Close all sockets, and remove the file if it is still ours."""
        if self._server is not None:
            self._server.close()
            self._server.remove_file()

    # -- requests

    def handle(self, message: Message, reply: Reply, uid: int) -> None:
        """Begin what ``message`` of a user asks for; ``reply`` is called once, now or later."""
        op = message.get("op")
        if op in {"status", "upstreams"}:
            reply({"ok": True, **self._describe(message)})
        elif op == "reload":
            self._asked.append(reply)
            problem = self._instance.reload()
            if problem:
                self._asked.remove(reply)
                reply(refusal(problem))
        elif op == "preview":
            self._preview(message, reply)
        elif op in {"sessions", "kill", "move"}:
            self._choose(message, reply)
        elif op == "upstream":
            self._order(message, reply, uid)
        elif op == "workers":
            self._resize(message.get("count"), reply)
        elif op == "upgrade":
            self._upgrade(reply)
        elif op == "stop":
            self._stopping.append(reply)
            self._instance.stop()
        else:
            reply(refusal(f"unknown operation; there are {', '.join(OPERATIONS)}"))

    def _describe(self, message: Message) -> Message:
        """The whole instance, or its groups, or one of them, which cost less."""
        if message["op"] == "status":
            return self._instance.status()
        group = message.get("group")
        only = group if isinstance(group, str) else None
        return {"groups": self._instance.describe_upstreams(only)}

    def _choose(self, message: Message, reply: Reply) -> None:
        """Begin to list, to end or to move the sessions that a message describes."""
        op = message["op"]
        try:
            choice, limit = read_choice(message)
            slot = read_slot(message) if op == "move" else 0
        except ValueError as err:
            reply(refusal(str(err)))
            return
        if op == "sessions":
            # One more than wanted shows whether that was all.
            self._instance.ask_sessions(
                Op.LIST,
                {**choice, "limit": limit + 1},
                lambda found, silent: reply(_listing(found, silent, limit)),
            )
        elif all(one is None for one in choice.values()):
            reply(refusal(f"{op} wants one of {', '.join(CONDITIONS)}: it is not for all sessions"))
        elif op == "kill":
            self._instance.ask_sessions(
                Op.KILL, choice, lambda found, silent: reply(_killed(found, silent))
            )
        else:
            problem = self._instance.move_sessions(
                choice, slot, lambda moved: reply({"ok": True, **moved})
            )
            if problem:
                reply(refusal(problem))

    def _order(self, message: Message, reply: Reply, uid: int) -> None:
        try:
            wanted = read_order(message)
        except ValueError as err:
            reply(refusal(str(err)))
            return
        problem = self._instance.order(wanted, uid, reply)
        if problem:
            reply(refusal(problem))

    def _upgrade(self, reply: Reply) -> None:
        self._upgrading.append(reply)
        problem = self._instance.upgrade()
        if problem and reply in self._upgrading:
            self._upgrading.remove(reply)
            reply(refusal(problem))

    def _resize(self, count: object, reply: Reply) -> None:
        size = new_size(count, self._instance.size) if isinstance(count, str) else None
        if size is None:
            reply(refusal('the count of workers is a text: "+1", "-1" or "4"'))
            return
        problem = self._instance.resize(size)
        if problem:
            reply(refusal(problem))
        else:
            self._settling.append((reply, {"ok": True, "workers": size}))

    # -- outcomes

    def on_loading(self) -> None:
        """The configuration is being read, for all that have asked so far."""
        self._loading += self._asked
        self._asked.clear()

    def on_rejected(self, problems: Iterable[str]) -> None:
        """The configuration that was read is not applied."""
        answer = refusal(REJECTED, problems=list(problems))
        replies, self._loading = self._loading, []
        for reply in replies:
            reply(answer)

    def on_accepted(self, report: str, generation: int) -> None:
        """The configuration is in force; workers have still to acknowledge it."""
        answer: Message = {"ok": True, "report": report, "generation": generation}
        self._settling += [(reply, answer) for reply in self._loading]
        self._loading.clear()

    def on_refused(self, problems: Iterable[str]) -> None:
        """The workers cannot serve the new configuration; the previous one is in force again."""
        answer = refusal(REJECTED, problems=list(problems))
        settling, self._settling = self._settling, []
        for reply, accepted in settling:
            if "report" in accepted:
                reply(answer)
            else:
                self._settling.append((reply, accepted))

    def on_unserved(self, problem: str) -> None:
        """The workers cannot serve their last assignment, which no reload has brought."""
        settling, self._settling = self._settling, []
        for reply, _ in settling:
            reply(refusal(problem))

    def on_settled(self) -> None:
        """Every worker has acknowledged its last assignment."""
        settled, self._settling = self._settling, []
        for reply, answer in settled:
            reply(answer)

    def on_upgraded(self, report: str, *, is_done: bool) -> None:
        """The successor serves, or has failed, as ``report`` says."""
        if is_done:
            self._look_at = math.inf  # names are the successor's to take
        replies, self._upgrading = self._upgrading, []
        for reply in replies:
            reply({"ok": True, "report": report} if is_done else refusal(report))

    def cancel(self) -> None:
        """Nothing more will be loaded, settled or upgraded."""
        settling = [reply for reply, _ in self._settling]
        waiting = [*self._asked, *self._loading, *settling, *self._upgrading]
        for replies in (self._asked, self._loading, self._settling, self._upgrading):
            replies.clear()
        for reply in waiting:
            reply(refusal(STOPPING))

    def on_stopped(self, report: Message) -> None:
        """All workers have gone, and old masters; ``report`` says what became of the sessions."""
        for reply in self._stopping:
            reply({"ok": True, **report})
        self._stopping.clear()
