"""The keys of a configuration that have one value each: how each is read, what it fills. Pure.

A new one is a row here and a field in ``model``; reading, completing, comparing and describing a
configuration, and writing one that was converted, go by these rows. Not here are the keys of which
several make one value: addresses, access rules, logs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.config import check_values as values
from forwarder.config import toml_values as read
from forwarder.config.address import MAX_PORT
from forwarder.config.model import (
    MAX_WEIGHT,
    Answers,
    Balance,
    Check,
    Framing,
    Group,
    Limits,
    OnDown,
    OnLimit,
    OnUp,
    RelayMode,
    Rule,
    Settings,
    SocketOptions,
    Upstream,
    without_unit,
)
from forwarder.config.presets import PATH_FORMS, parse_path
from forwarder.config.quantities import BANDWIDTH_FORMS, RATE_FORMS, parse_bandwidth, parse_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from forwarder.config.raw import RawKeys, Value
    from forwarder.config.toml_table import Table
    from forwarder.config.toml_values import Reader

# Each flow has one or two descriptors, of which a process has at most 2^20 on Linux by default.
_MOST_FLOWS: Final = 1 << 20
# More than a machine has ports and memory for; catches a number in the wrong place.
_MOST_SESSIONS: Final = 100_000_000
# The kernel's own bound, include/net/tcp.h.
_MOST_KEEPALIVE_PROBES: Final = 127
# Arbitrary; catches a buffer size in the wrong place.
_MOST_BACKLOG: Final = 1 << 20
# Below the least the kernel would raise it; above the most its double is no int (socket(7)).
_BUFFER_BYTES: Final = (4096, (1 << 30) - 1)
_MOST_MARK: Final = (1 << 32) - 1
# As HAProxy has it.
_MOST_RETRIES: Final = 16
# Arbitrary; a server is judged by more checks than that within hours only.
_MOST_CHECKS: Final = 1000
# An hour is hardly a check any more; below the least, checks are a load.
_INTERVAL_S: Final = (0.1, 3600.0)
_TIMEOUT_S: Final = (0.01, 3600.0)
# Ejections become longer up to five minutes, so none begins above.
_EJECT_S: Final = (0.1, 300.0)
_SLOW_START_S: Final = (1.0, 86400.0)
# RFC 8305 5: at least 10 ms; more than a minute is none.
_ATTEMPT_DELAY_S: Final = (0.01, 60.0)
_MOST_JITTER: Final = 50


class Sockets(Enum):
    """Which sockets of a rule an option is for: their kind, and where the rule has none."""

    TCP = "TCP", "no side of this rule is one"
    IP = "IP", "no side of this rule is one"
    UPSTREAM_IP = "IP", "no upstream of this rule is one"
    LISTENING_IP = "IP", "this rule does not listen on one"
    LISTENING_STREAM = "TCP and unix", "this rule does not listen on one"

    @property
    def kind(self) -> str:
        """Their name."""
        return self.value[0]

    @property
    def lack(self) -> str:
        """The message for a rule that has none."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    ``read`` takes it out of a TOML table, and reports what is wrong with it. ``of`` is what has the
    value in the model, in a field that is called as the key with its unit, or ``field``.
    ``at_top``: it may stand at the top of a file, too, as the default of all rules, or of those
    that have such ``sockets``. ``shown`` makes of the value what stands in a file. ``said``
    describes a rule that does not have the default; if empty, nothing does.
    """

    name: str
    read: Reader
    of: type
    field: str = ""
    at_top: bool = False
    sockets: Sockets | None = None
    shown: Callable[[Value], Value] = lambda value: value
    said: str = ""
    default: object = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self.of):
            if one.name == self.field or (not self.field and without_unit(one.name) == self.name):
                object.__setattr__(self, "field", one.name)
                object.__setattr__(self, "default", one.default)
                return
        raise TypeError(f"{self.of.__name__} has no field for the key {self.name}")


def _retry(value: Value) -> Value:
    return "retry" if value else "require"


def _octal(value: Value) -> Value:
    return f"{value:04o}"


def _percent(value: Value) -> Value:
    return round(value * 100) if isinstance(value, float) else value


def _start(value: Value) -> Value:
    return "down" if value else "up"


def _between(least_s: float, most_s: float, *, or_none: bool = False) -> Reader:
    return read.quantity(
        values.between(least_s, most_s, or_none=or_none),
        values.between_forms(least_s, most_s, or_none=or_none),
    )


def _option(
    name: str, reader: Reader, sockets: Sockets | None = None, *, at_top: bool = False
) -> Key:
    said = f"{name} {{}}"
    return Key(name, reader, SocketOptions, at_top=at_top, sockets=sockets, said=said)


def _table(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


OF_A_GROUP: Final = _table(
    Key("balance", read.choice(Balance), Group, said="balance {}"),
    Key(
        "hash_prefix",
        read.quantity(values.parse_prefixes, values.PREFIX_FORMS),
        Group,
        shown=values.show_prefixes,  # type: ignore[arg-type]  # as it is read
        said="by networks of {} bits",
    ),
    Key("slow_start", _between(*_SLOW_START_S, or_none=True), Group, said="slow start {} s"),
    Key("max_queue", read.number(0, _MOST_SESSIONS), Group, said="at most {} waiting"),
    Key("queue_timeout", read.duration, Group),
    Key("retries", read.number(0, _MOST_RETRIES), Group, said="retries {}"),
    Key("attempt_delay", _between(*_ATTEMPT_DELAY_S, or_none=True), Group),
    Key("fail", read.number(0, _MOST_CHECKS), Group, said="ejects after {} failures"),
    Key("fail_within", _between(*_INTERVAL_S), Group),
    Key("eject", _between(*_EJECT_S), Group),
    Key("panic", read.quantity(values.percent(100), values.percent_forms(100)), Group),
    Key("fail_open", read.flag, Group, "fails_open", said="fail_open {}"),
    Key("on_down", read.choice(OnDown), Group, said="on_down {}"),
    Key("on_up", read.choice(OnUp), Group, said="on_up {}"),
)
"""Those of a group with one value; a rule may have them for its own upstreams."""

OF_A_SERVER: Final = _table(
    Key("weight", read.number(0, MAX_WEIGHT), Upstream, said="weight {}"),
    Key("backup", read.flag, Upstream, "is_backup", said="backup"),
    Key("max_sessions", read.number(1, _MOST_SESSIONS), Upstream, said="at most {} sessions"),
    Key("expand", read.flag, Upstream, "expands", said="each address a server"),
)
"""Those of a server of a group beside its address."""

OF_A_CHECK: Final = _table(
    Key("port", read.number(1, MAX_PORT), Check, said="port {}"),
    Key("host", read.host, Check, said="host {}"),
    Key("path", read.quantity(parse_path, PATH_FORMS), Check, said="path {}"),
    Key(
        "status",
        read.quantity(values.parse_status, values.STATUS_FORMS),
        Check,
        shown=values.show_status,  # type: ignore[arg-type]  # as it is read
        said="status {}",
    ),
    Key(
        "command",
        read.quantity(values.parse_command, values.COMMAND_FORMS),
        Check,
        "argv",
        said="command {}",
    ),
    Key("verify", read.flag, Check, "is_verified", said="verified"),
    Key("every", _between(*_INTERVAL_S), Check, said="every {} s"),
    Key("fast", _between(*_INTERVAL_S), Check),
    Key("down", _between(*_INTERVAL_S), Check),
    Key("timeout", _between(*_TIMEOUT_S), Check),
    Key("fall", read.number(1, _MOST_CHECKS), Check, said="fall {}"),
    Key("rise", read.number(1, _MOST_CHECKS), Check, said="rise {}"),
    Key(
        "jitter",
        read.quantity(values.part(_MOST_JITTER), values.percent_forms(_MOST_JITTER)),
        Check,
        shown=_percent,
    ),
    Key(
        "start",
        read.quantity(values.parse_start, values.START_FORMS),
        Check,
        "starts_down",
        shown=_start,
        said="start {}",
    ),
)
"""Those of a check with one value, beside ``kind``, ``send`` and ``expect``."""

OF_A_RULE: Final = _table(
    Key("source_address", read.host, Rule, "source", said="from {}"),
    Key("timeout", read.duration, Rule, "udp_timeout_s"),
    Key("max_flows", read.number(1, _MOST_FLOWS), Rule, said="at most {} flows"),
    Key("framing", read.choice(Framing), Rule, said="framing {}"),
    Key("answers", read.choice(Answers), Rule, said="answers {}"),
    Key("connect_timeout", read.duration, Rule, at_top=True),
    Key("half_close_timeout", read.duration, Rule, at_top=True),
    Key("idle_timeout", read.duration, Rule, at_top=True),
    Key("max_sessions", read.number(1, _MOST_SESSIONS), Limits),
    Key("max_sessions_per_client", read.number(1, _MOST_SESSIONS), Limits),
    Key("rate", read.quantity(parse_rate, RATE_FORMS), Limits),
    Key("burst", read.number(1, _MOST_SESSIONS), Limits),
    Key("rate_per_client", read.quantity(parse_rate, RATE_FORMS), Limits),
    Key("burst_per_client", read.number(1, _MOST_SESSIONS), Limits),
    Key("bandwidth", read.quantity(parse_bandwidth, BANDWIDTH_FORMS), Limits),
    Key("on_limit", read.choice(OnLimit), Limits),
    Key("mode", read.permissions, Rule, "unix_mode", shown=_octal, said="mode {}"),
    _option("keepalive", read.flag, Sockets.TCP, at_top=True),
    _option("keepalive_idle", read.whole_seconds, Sockets.TCP, at_top=True),
    _option("keepalive_interval", read.whole_seconds, Sockets.TCP, at_top=True),
    _option("keepalive_count", read.number(1, _MOST_KEEPALIVE_PROBES), Sockets.TCP, at_top=True),
    _option("nodelay", read.flag, Sockets.TCP, at_top=True),
    _option("user_timeout", read.milliseconds, Sockets.TCP, at_top=True),
    _option("backlog", read.number(1, _MOST_BACKLOG), Sockets.LISTENING_STREAM, at_top=True),
    _option("rcvbuf", read.number(*_BUFFER_BYTES), Sockets.IP),
    _option("sndbuf", read.number(*_BUFFER_BYTES), Sockets.IP),
    _option("fast_open", read.sides),
    _option("fast_open_queue", read.number(1, _MOST_BACKLOG)),
    _option("mptcp", read.sides),
    _option("congestion", read.congestion, Sockets.TCP),
    _option("mark", read.number(0, _MOST_MARK), Sockets.IP),
    _option("upstream_mark", read.number(0, _MOST_MARK), Sockets.UPSTREAM_IP),
    _option("device", read.device, Sockets.LISTENING_IP),
    _option("upstream_device", read.device, Sockets.UPSTREAM_IP),
    _option("transparent", read.flag, Sockets.UPSTREAM_IP),
    _option("dscp", read.dscp, Sockets.IP),
    Key(
        "bind",
        read.is_retry,
        Rule,
        "retries_bind",
        at_top=True,
        shown=_retry,
        said="may wait for its address",
    ),
    *OF_A_GROUP.values(),
)
"""Those of a rule, in the order in which a rule is described and written."""

DEFAULTS: Final = {name: key for name, key in OF_A_RULE.items() if key.at_top}
"""Those of a rule that may stand at the top, as defaults of all rules."""

AT_THE_TOP: Final = _table(
    Key("control", read.text, Settings),
    Key("cut_denied", read.flag, Settings),
    Key("deposit_after", read.duration, Settings),
    Key("drain_timeout", read.duration, Settings),
    Key("group", read.text, Settings),
    Key("hang_timeout", read.hang_timeout, Settings),
    Key("max_sessions", read.number(1, _MOST_SESSIONS), Settings),
    Key("pid_file", read.text, Settings),
    Key("relay", read.choice(RelayMode), Settings),
    Key("state_file", read.text, Settings),
    Key("user", read.text, Settings),
    Key("workers", read.workers, Settings, shown=lambda value: value or "auto"),
)
"""Those of the whole process."""

OF_CHECKS: Final = _table(
    Key("commands", read.flag, Settings, "runs_commands"),
)
"""Those of the table ``checks`` at the top."""

_BY_FIELD: Final = {
    (key.of, key.field): key
    for table in (OF_A_RULE, OF_A_SERVER, OF_A_CHECK, AT_THE_TOP, OF_CHECKS)
    for key in table.values()
}


def key_of(part: type, field_name: str) -> Key | None:
    """The key that fills a field of the model, if one alone does."""
    return _BY_FIELD.get((part, field_name))


def read_keys(table: Table, rows: Mapping[str, Key]) -> RawKeys:
    """Read the keys among ``rows`` that a table has, by name, as far as they are right."""
    found = {name: rows[name].read(table, name) for name in sorted(table) if name in rows}
    return {name: placed for name, placed in found.items() if placed is not None}


def values_of(part: type, given: RawKeys, rows: Mapping[str, Key]) -> dict[str, Value]:
    """The fields of a part of the model that ``given`` fills, by name."""
    return {
        rows[name].field: placed.value for name, placed in given.items() if rows[name].of is part
    }
