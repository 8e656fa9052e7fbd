"""The answers to ``forwarder status``, ``sessions``, ``upstream`` and ``stop`` as text. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_MOST = 1 << 64
_WORKER_COLUMNS = ("slot", "pid", "state", "generation", "uptime", "sessions", "total", "bytes")
_RULE_COLUMNS = ("rule", "listens on", "upstreams", "sessions", "total", "failed", "queued")
_SERVER_COLUMNS = ("group", "server", "state", "weight", "sessions", "total", "failed", "why")
_USABLE = ("up", "slow")  # states of servers
_SESSION_COLUMNS = ("id", "rule", "client", "upstream", "state", "to", "from", "age", "silent")


def as_text(status: Mapping[str, object], now: float) -> list[str]:
    """The status as lines for people. ``now``: seconds since 1970."""
    totals, rates = _table(status.get("totals")), _table(status.get("rates"))
    lines = [
        f"forwarder {status.get('version')}, pid {status.get('pid')}, {status.get('state')}, "
        f"generation {status.get('generation')}, up {as_duration(_number(status.get('uptime_s')))}",
        f"{count(totals, 'sessions')} sessions, {count(totals, 'sessions_total')} in total, "
        f"{count(totals, 'connects_failed')} failed to connect; "
        f"{as_bytes(count(totals, 'bytes_c2u'))} to upstreams, "
        f"{as_bytes(count(totals, 'bytes_u2c'))} to clients" + _moved_text(totals),
        f"now {_number(rates.get('sessions_total_per_s')):.1f} new sessions/s, "
        f"{as_bytes(count(rates, 'bytes_c2u_per_s'))}/s to upstreams, "
        f"{as_bytes(count(rates, 'bytes_u2c_per_s'))}/s to clients",
        *(
            f"predecessor pid {one.get('pid')} drains, {sessions(count(one, 'sessions'))}"
            for one in map(_table, _list(status.get("predecessors")))
        ),
        "",
    ]
    workers = [_worker_row(_table(worker)) for worker in _list(status.get("workers"))]
    rules = [_rule_row(_table(rule)) for rule in _list(status.get("rules"))]
    names = _names_as_text(_table(rule) for rule in _list(status.get("rules")))
    failing = _failing_as_text(_table(rule) for rule in _list(status.get("rules")))
    tables = [*_columns(_WORKER_COLUMNS, workers), "", *_columns(_RULE_COLUMNS, rules)]
    groups = groups_as_text(_list(status.get("groups")), now)
    tables += ["", *groups] if groups else []
    return [*lines, *tables, *_unserved_as_text(status), *names, *failing]


def _moved_text(totals: Mapping[str, object]) -> str:
    """How many sessions have gone on in another worker, if some have."""
    moved = count(totals, "moved_in")
    return f"; {sessions(moved)} moved to other workers" if moved else ""


def _unserved_as_text(status: Mapping[str, object]) -> list[str]:
    """What workers should serve and do not, after an empty line, if there is any."""
    lines = [
        f"worker {worker.get('slot')} cannot serve its assignment, and goes on as before: "
        f"{worker.get('refusal')}"
        for worker in map(_table, _list(status.get("workers")))
        if worker.get("refusal")
    ]
    lines += [
        f"rule {rule.get('name')}: no worker accepts on {count(rule, 'unserved')} of its sockets"
        for rule in map(_table, _list(status.get("rules")))
        if count(rule, "unserved")
    ]
    return ["", *lines] if lines else []


def _names_as_text(rules: Iterable[Mapping[str, object]]) -> list[str]:
    """The names that have no good answer now, after an empty line, if there are some."""
    lines = []
    for rule in rules:
        for name in map(_table, _list(rule.get("names"))):
            used = ", ".join(map(str, _list(name.get("addresses")))) or "none"
            what = "is being looked up"
            if name.get("state") == "failed":
                since = as_duration(_number(name.get("for_s")))
                what = f"unresolved for {since}: {name.get('why')}; in use: {used}"
            lines.append(f"rule {rule.get('name')}: {name.get('host')} {what}")
    return ["", *lines] if lines else []


def _failing_as_text(rules: Iterable[Mapping[str, object]]) -> list[str]:
    """The addresses of upstreams that fail now, after an empty line, if there are some."""
    lines = []
    for rule in rules:
        for failing in map(_table, _list(rule.get("failing"))):
            since = as_duration(_number(failing.get("since_s")))
            lines.append(
                f"rule {rule.get('name')}: {failing.get('upstream')} cannot be used for {since}, "
                f"{failing.get('why')}"
            )
    return ["", *lines] if lines else []


# -- groups of upstreams


def groups_as_text(groups: Sequence[object], now: float) -> list[str]:
    """The servers of groups, one a line; nothing if there are none. ``now``: seconds since 1970."""
    rows = [
        _server_row(str(group.get("name")), server, now)
        for group in map(_table, groups)
        for server in map(_table, _list(group.get("servers")))
    ]
    if not rows:
        return []
    waiting = [
        f"group {group.get('name')}: {sessions(count(group, 'waiting'))} wait for a server"
        for group in map(_table, groups)
        if count(group, "waiting")
    ]
    return [*_columns(_SERVER_COLUMNS, rows), *waiting]


def _server_row(group: str, server: Mapping[str, object], now: float) -> list[str]:
    state = str(server.get("state"))
    if server.get("backup") is True:
        state += " backup"
    if server.get("since_s") is not None:
        state += f" {as_duration(_number(server.get('since_s')))}"
    is_missed = server.get("is_used") is True and server.get("state") not in _USABLE
    said = (
        _order_text(_table(server.get("order")), now),
        str(server.get("why") or ""),
        "used all the same" if is_missed else "",
    )
    return [
        group,
        str(server.get("server")),
        state,
        _weight_text(server),
        *(str(count(server, key)) for key in ("sessions", "sessions_total", "failed")),
        "; ".join(filter(None, said)),
    ]


def _weight_text(server: Mapping[str, object]) -> str:
    """The weight now, and the configured one if that differs."""
    if "weight" not in server:
        return "-"
    weight, weight_now = _number(server.get("weight")), _number(server.get("weight_now"))
    return f"{weight:g}" if weight == weight_now else f"{weight_now:.3g} of {weight:g}"


def _order_text(order: Mapping[str, object], now: float) -> str:
    """What was ordered of a server, by whom, and when; "" for nothing."""
    if not order:
        return ""
    weight = "" if order.get("weight") is None else f"weight {count(order, 'weight')}"
    what = {"drain": "drained", "disable": "disabled"}.get(str(order.get("what")), "")
    if what and order.get("reset") is True:
        what += " with reset"
    ago = as_duration(max(0.0, now - _number(order.get("at"))))
    return f"{', '.join(filter(None, (what, weight)))} by {order.get('by')} {ago} ago"


def order_as_text(answer: Mapping[str, object], now: float) -> list[str]:
    """What became of an order, a line for each server."""
    lines = []
    for server in map(_table, _list(answer.get("servers"))):
        said = _order_text(_table(server.get("order")), now) or "as configured"
        if server.get("changed") is not True:
            said = f"already {said}"
        else:
            said = said.rpartition(" by ")[0] or said
        if server.get("state") not in {"up", "absent"}:
            said += f", {server.get('state')}"
        left = sessions(count(server, "sessions"))
        lines.append(f"{answer.get('group')} {server.get('server')}: {said}, {left}")
    return lines


def servers_in(group: Mapping[str, object]) -> list[str]:
    """The names of the servers of a group, or of an answer to an order."""
    return [str(_table(one).get("server")) for one in _list(group.get("servers"))]


def sessions_of(group: Mapping[str, object], servers: Collection[str]) -> int:
    """How many sessions some servers of a group have together."""
    found = [_table(one) for one in _list(group.get("servers"))]
    return sum(count(one, "sessions") for one in found if one.get("server") in servers)


def stop_as_text(answer: Mapping[str, object]) -> str:
    """What became of sessions at a stop, for people."""
    ended, cut = count(answer, "ended"), count(answer, "cut")
    if not ended and not cut:
        return "stopped"
    after_s = _number(answer.get("after_s"))
    return f"stopped: {ended} ended, {cut} reset after {after_s:.{0 if after_s >= 10 else 1}f} s"


def moved_as_text(answer: Mapping[str, object], slot: int) -> list[str]:
    """What became of an order to move sessions."""
    lines = [f"{sessions(count(answer, 'moved'))} moved to the worker in slot {slot}"]
    if busy := count(answer, "busy"):
        why = "they look for an upstream, or are UDP flows that have not settled"
        lines.append(f"{sessions(busy)} cannot be moved yet: {why}")
    if back := count(answer, "back"):
        lines.append(f"{sessions(back)} stay where they are")
    return lines


def sessions(number: int) -> str:
    """A number of sessions, for people."""
    return f"{number} session{'' if number == 1 else 's'}"


def sessions_as_text(sessions: Sequence[object]) -> list[str]:
    """Sessions as lines for people; with their servers if some are of a group."""
    found = list(map(_table, sessions))
    has_groups = any(session.get("group") for session in found)
    columns, more = list(_SESSION_COLUMNS), ["group", "server"] if has_groups else []
    columns[4:4] = more
    rows = [
        [
            *(str(session.get(key)) for key in ("id", "rule", "client", "upstream")),
            *(str(session.get(key) or "-") for key in more),
            str(session.get("state")),
            as_bytes(count(session, "bytes_c2u")),
            as_bytes(count(session, "bytes_u2c")),
            as_duration(_number(session.get("age_s"))),
            as_duration(_number(session.get("idle_s"))),
        ]
        for session in found
    ]
    return _columns(columns, rows)


def as_duration(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def as_bytes(count: int) -> str:
    """A number of bytes in a unit that leaves at most four digits."""
    size = float(count)
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _worker_row(worker: Mapping[str, object]) -> list[str]:
    moved = count(worker, "bytes_c2u") + count(worker, "bytes_u2c")
    return [
        *(str(worker.get(key)) for key in ("slot", "pid", "state", "generation")),
        as_duration(_number(worker.get("uptime_s"))),
        str(count(worker, "sessions")),
        str(count(worker, "sessions_total")),
        as_bytes(moved),
    ]


def _rule_row(rule: Mapping[str, object]) -> list[str]:
    listens = " ".join(map(str, _list(rule.get("addresses"))))
    if rule.get("state") in ("waiting", "partial"):
        why = f"{rule.get('why')}; next attempt in {_number(rule.get('retry_in_s')):.0f} s"
        listens = f"{listens} ({why})" if listens else why
    return [
        str(rule.get("name")),
        listens,
        " ".join(map(str, _list(rule.get("upstreams")))),
        *(str(count(rule, key)) for key in ("sessions", "sessions_total", "connects_failed")),
        str(count(_table(rule.get("queue")), "waiting")),
    ]


def _columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    ]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    """A number; 0 for anything else, since workers, which are not trusted, supply it."""
    return value if isinstance(value, int | float) and -_MOST < value < _MOST else 0.0


def count(table: Mapping[str, object], key: str) -> int:
    """A counter of an answer; 0 if it is none."""
    return int(_number(table.get(key)))
