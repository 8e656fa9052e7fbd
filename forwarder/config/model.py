"""The configuration as a value: what both dialects are read into, all that the rest knows of it.

Frozen, so equality shows whether a rule changed. Parses nothing, resolves nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from forwarder.config.address import UnixAddress

if TYPE_CHECKING:
    from pathlib import PurePath

    from forwarder.config.address import Endpoint
    from forwarder.errors import Place

# One table of defaults; the dialects, the command line and the documentation refer to it.
CONNECT_TIMEOUT_S = 10.0
HALF_CLOSE_TIMEOUT_S = 300.0
IDLE_TIMEOUT_S = 0.0  # 0 = never; keepalive finds dead peers
UDP_TIMEOUT_S = 72.0  # rinetd's
MAX_FLOWS = 65536  # of a rule; each has one or two descriptors
EVERY_S = 2.0  # from one check of a server to the next; HAProxy's
UNIX_MODE = 0o660
BACKLOG = 4096  # the kernel caps it at net.core.somaxconn, whose default is 4096
MAX_WEIGHT = 256  # of a server, as in HAProxy
FAST_OPEN_QUEUE = 256  # clients whose handshake is not over; arbitrary, HAProxy's is the backlog
STOP_TIMEOUT_S = 30.0  # for sessions at a graceful stop; arbitrary, below systemd's 90 s
HANG_TIMEOUT_S = 10.0  # without a sign of life of a worker; arbitrary

# Arbitrary; catches a port or a pid written in the wrong place before it becomes processes.
MAX_WORKERS = 1024

_UNIT = re.compile("_(s|ms|bytes)$")


def without_unit(field_name: str) -> str:
    """The key of a field: units are in the names of the model, and not in those of a file."""
    return _UNIT.sub("", field_name)


class Dialect(Enum):
    """The language a configuration file is written in."""

    TOML = "toml"
    RINETD = "rinetd"

    @classmethod
    def of(cls, path: PurePath) -> Dialect:
        """The language of a file by its name: ``.toml`` is TOML, anything else rinetd.conf."""
        return cls.TOML if path.suffix == ".toml" else cls.RINETD


class Protocol(Enum):
    """The transports on the two sides of a rule (oxidinetd's names)."""

    TCP = "tcp"
    UDP = "udp"
    UDP_TO_TCP = "udptotcp"
    TCP_TO_UDP = "tcptoudp"

    @property
    def listens_on_udp(self) -> bool:
        """Whether clients speak UDP."""
        return self is Protocol.UDP or self is Protocol.UDP_TO_TCP

    @property
    def connects_by_udp(self) -> bool:
        """Whether upstreams are reached by UDP."""
        return self is Protocol.UDP or self is Protocol.TCP_TO_UDP


class Framing(Enum):
    """How datagrams are kept apart on the TCP side of a rule between UDP and TCP.

    ``raw``: not at all. ``length``: two bytes before each, as in DNS over TCP (RFC 1035 4.2.2).
    """

    RAW = "raw"
    LENGTH = "length"


class Answers(Enum):
    """What the upstream of a UDP client answers with.

    ``many``: any number of datagrams, from the port that was asked. ``one``: one to each datagram,
    as in DNS; the flow ends when nothing is left to be answered. ``any-port``: many, from whatever
    port answers first, as in TFTP.
    """

    MANY = "many"
    ONE = "one"
    ANY_PORT = "any-port"


class BindPolicy(Enum):
    """What becomes of a rule whose address cannot be bound.

    ``require``: nothing starts, or a reload is refused. ``retry``: the others start without it.
    """

    REQUIRE = "require"
    RETRY = "retry"


class RelayMode(Enum):
    """How bulk data is moved: ``auto`` is splice(2) where the system has it."""

    AUTO = "auto"
    SPLICE = "splice"
    COPY = "copy"


class Sides(Enum):
    """On which sides of a rule something is used: where clients come, where upstreams are."""

    OFF = "off"
    LISTEN = "listen"
    CONNECT = "connect"
    BOTH = "both"

    @property
    def on_listen(self) -> bool:
        """Whether it is used where clients come."""
        return self in (Sides.LISTEN, Sides.BOTH)

    @property
    def on_connect(self) -> bool:
        """Whether it is used towards upstreams."""
        return self in (Sides.CONNECT, Sides.BOTH)


class LogFormat(Enum):
    """Format of the connection log: rinetd's two, tab-separated and as a web server's, and JSON."""

    RINETD = "rinetd"
    COMMON = "common"
    JSON = "json"


class OnLimit(Enum):
    """What becomes of clients at a limit: reset, or left in the queue of the listening socket."""

    RESET = "reset"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a rule, over all workers; 0 is no limit.

    ``rate`` is new sessions per second on average, ``burst`` how many may come at once.
    ``bandwidth`` is bytes per second, each way.
    """

    max_sessions: int = 0
    max_sessions_per_client: int = 0
    rate: float = 0.0
    burst: float = 1.0
    rate_per_client: float = 0.0
    burst_per_client: float = 1.0
    bandwidth: float = 0.0
    on_limit: OnLimit = OnLimit.RESET

    @property
    def has_admission(self) -> bool:
        """Whether a client may be refused or have to wait."""
        return bool(
            self.max_sessions or self.max_sessions_per_client or self.rate or self.rate_per_client
        )


class Verdict(Enum):
    """What an access rule says of the clients that match it."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRule:
    """One allow or deny line; ``pattern`` as written (a wildcard text, an address or a network)."""

    verdict: Verdict
    pattern: str
    place: Place = field(compare=False)

    @property
    def is_allow(self) -> bool:
        """Whether the rule allows; otherwise it denies."""
        return self.verdict is Verdict.ALLOW


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """Where the connection log goes: a path, ``stderr``, ``syslog`` or ``journal``; and how."""

    to: str
    format: LogFormat
    place: Place = field(compare=False)
    # As in rinetd.conf: a file that cannot be opened costs its log, and no forwarding.
    is_optional: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """Options of a rule's sockets, on both sides unless said otherwise; None leaves the kernel's.

    Those of TCP concern the side that is TCP, if one is. Unix sockets have a backlog only.
    ``device`` is of the listening side; ``upstream_mark`` and ``upstream_device`` of the other one,
    whose mark is ``mark`` when that is None. ``transparent``: upstreams see the client's address.
    ``places`` says where the options stand that the rule has, by key.
    """

    keepalive: bool = True
    keepalive_idle_s: int | None = None
    keepalive_interval_s: int | None = None
    keepalive_count: int | None = None
    nodelay: bool = True
    user_timeout_ms: int | None = None
    backlog: int = BACKLOG
    rcvbuf_bytes: int | None = None
    sndbuf_bytes: int | None = None
    fast_open: Sides = Sides.OFF
    fast_open_queue: int = FAST_OPEN_QUEUE
    mptcp: Sides = Sides.OFF
    congestion: str | None = None
    mark: int = 0
    upstream_mark: int | None = None
    device: str | None = None
    upstream_device: str | None = None
    transparent: bool = False
    dscp: int | None = None
    places: tuple[tuple[str, Place], ...] = field(default=(), compare=False, repr=False)

    @property
    def mark_of_upstreams(self) -> int:
        """The mark of sockets towards upstreams; 0 is none."""
        return self.mark if self.upstream_mark is None else self.upstream_mark

    @property
    def needs_rights(self) -> bool:
        """Whether workers need a capability to set them."""
        return bool(self.mark or self.upstream_mark or self.transparent)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a rule leads: one server of its group.

    ``weight`` is its part of the sessions relative to the other servers; 0: only where nothing else
    is left. ``is_backup`` keeps it for when no other is usable. ``max_sessions`` bounds those that
    it has over all workers and all rules of the group; 0 is no limit. ``expands``: each address of
    its name is a server. ``origin``: what is written in place of this one, which was looked up.
    """

    end: Endpoint
    weight: int = 1
    is_backup: bool = False
    max_sessions: int = 0
    expands: bool = False
    origin: Upstream | None = None

    @property
    def is_several(self) -> bool:
        """Whether it is no server, but stands for those that a look-up finds."""
        return self.expands or self.end.is_service

    def __str__(self) -> str:
        return str(self.end)


class Balance(Enum):
    """Which server of a group gets the next session.

    ``turn``: each in turn, smoothly by weight. ``least``: the one with the fewest sessions by
    weight, over all workers. ``random``: of two drawn, the one with fewer. ``hash``: always the
    same one for the same client, as long as it is usable. ``first``: the first that has room.
    """

    TURN = "turn"
    LEAST = "least"
    RANDOM = "random"
    HASH = "hash"
    FIRST = "first"


class OnDown(Enum):
    """What becomes of the sessions of a server that a check has found down."""

    KEEP = "keep"
    RESET = "reset"


class OnUp(Enum):
    """What becomes of the sessions of backups when another server is usable again."""

    KEEP = "keep"
    RETURN = "return"


class CheckKind(Enum):
    """How a server is checked. Presets such as ``redis`` are these with texts to send, expect."""

    TCP = "tcp"
    TLS = "tls"
    HTTP = "http"
    UDP = "udp"
    COMMAND = "command"
    AGENT = "agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How the servers of a group are checked. All durations are seconds.

    ``port`` 0 is the server's own, ``host`` "" its name. ``status`` are ranges of HTTP codes that
    are good. ``expect`` is bytes that the first 16 KiB of an answer contain or, if
    ``is_pattern``, a regular expression that is found in them; empty: any answer. ``argv`` is a
    command, and whether ``is_verified`` a certificate. A check is repeated ``every_s``; while the
    outcome is changing or unknown ``fast_s``, while the server is down ``down_s``. ``fall`` bad
    ones in a row are down, ``rise`` good ones up. ``jitter`` is a part of the interval.
    ``starts_down``: no sessions before the first good check.
    """

    kind: CheckKind
    port: int = 0
    host: str = ""
    path: str = "/"
    status: tuple[tuple[int, int], ...] = ((200, 299),)
    send: bytes = b""
    expect: bytes = b""
    is_pattern: bool = False
    argv: tuple[str, ...] = ()
    is_verified: bool = False
    every_s: float = EVERY_S
    fast_s: float = 1.0
    down_s: float = EVERY_S
    timeout_s: float = EVERY_S
    fall: int = 3
    rise: int = 2
    jitter: float = 0.1
    starts_down: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How sessions are spread over the upstreams of a rule. All durations are seconds.

    ``name`` is that of a group that rules share; empty for the group of one rule, which is called
    as the rule. ``hash_prefix`` says how many bits of an IPv4 and an IPv6 client count.
    ``slow_start_s``: how long a server that is up again takes to its full weight. ``max_queue``
    sessions may wait for a server with room, for ``queue_timeout_s`` (None: ``connect_timeout``;
    0: without end).
    ``retries`` is how many other servers are tried; None: one try for each, at most 3.
    ``attempt_delay_s`` passes until the next address is tried beside one that does not answer, 0
    is never. ``fail`` failed connects in a row, within ``fail_within_s``, eject a server for
    ``eject_s``, each further time for longer; 0 is never. Below ``panic`` per cent of usable
    servers all are used. ``fails_open``: when none is usable all are, rather than none.
    """

    name: str = ""
    balance: Balance = Balance.TURN
    hash_prefix: tuple[int, int] = (32, 128)
    slow_start_s: float = 0.0
    max_queue: int = 0
    queue_timeout_s: float | None = None
    retries: int | None = None
    attempt_delay_s: float = 0.25
    fail: int = 3
    fail_within_s: float = 10.0
    eject_s: float = 10.0
    panic: int = 0
    fails_open: bool = True
    on_down: OnDown = OnDown.KEEP
    on_up: OnUp = OnUp.KEEP
    check: Check | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One configured forwarding. All durations are seconds; 0 means no limit.

    ``name`` identifies the rule in logs and messages; unique within a configuration.
    ``upstreams`` has at least one. Each new session starts at the next one in turn and tries the
    others when it cannot connect.
    ``listen`` may be a range of ports; an upstream then is a range of as many, one to one, or a
    single port. Unix sockets have no ranges and speak TCP rules only.
    ``source`` is the local address of upstream connections, or None. ``udp_timeout_s`` ends silent
    flows; ``max_flows`` bounds how many there are at once. ``unix_mode`` are the permissions of a
    unix socket listened on. ``retries_bind``: an address that cannot be bound does not keep the
    other rules from starting. ``place`` takes no part in equality: moving a line changes no rule.
    """

    name: str
    listen: Endpoint
    upstreams: tuple[Upstream, ...]
    group: Group = Group()
    protocol: Protocol = Protocol.TCP
    source: str | None = None
    access: tuple[AccessRule, ...] = ()
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    half_close_timeout_s: float = HALF_CLOSE_TIMEOUT_S
    idle_timeout_s: float = IDLE_TIMEOUT_S
    udp_timeout_s: float = UDP_TIMEOUT_S
    max_flows: int = MAX_FLOWS
    framing: Framing = Framing.RAW
    answers: Answers = Answers.MANY
    limits: Limits = Limits()
    unix_mode: int = UNIX_MODE
    retries_bind: bool = False
    options: SocketOptions = SocketOptions()
    place: Place = field(compare=False)

    @property
    def has_members(self) -> bool:
        """Whether look-ups decide which upstreams it has, or have decided."""
        return any(one.origin or one.is_several for one in self.upstreams)

    @property
    def upstream_ends(self) -> tuple[Endpoint, ...]:
        """The addresses of the upstreams, where nothing else of them counts."""
        return tuple(upstream.end for upstream in self.upstreams)

    @property
    def group_name(self) -> str:
        """The name of its group, which is its own unless it shares one."""
        return self.group.name or self.name

    @property
    def is_balanced(self) -> bool:
        """Whether there is something to choose, to bound, to check or to try again.

        A group that rules share is balanced with one server, too: it may be drained, and have more
        after a reload. Other rules pay nothing.
        """
        group = self.group
        return (
            len(self.upstreams) > 1
            or bool(group.name or group.retries or group.check or self.has_members)
            or any(upstream.max_sessions for upstream in self.upstreams)
        )

    @property
    def first_port(self) -> int:
        """The first port it listens on; 0 for a unix socket."""
        return 0 if isinstance(self.listen, UnixAddress) else self.listen.port


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for the whole process. ``workers`` 0 means one per usable CPU.

    ``max_sessions`` is of all rules together, 0 is no limit. ``user`` and ``group`` are those of
    the workers. ``drain_timeout_s`` bounds how long sessions go on after their rule, their worker
    or the instance has to end; None means 30 s for a stop and no limit else, 0 none at all.
    ``cut_denied``: changed access rules also end open sessions that they do not allow.
    ``runs_commands``: checks may be commands. ``state_file`` keeps orders over a restart.
    ``deposit_after_s``: from this age on sessions outlive their worker; 0: none does.
    """

    workers: int = 0
    relay: RelayMode = RelayMode.AUTO
    logs: tuple[LogPlace, ...] = ()
    max_sessions: int = 0
    pid_file: str | None = None
    control: str | None = None
    user: str | None = None
    group: str | None = None
    drain_timeout_s: float | None = None
    hang_timeout_s: float = HANG_TIMEOUT_S
    deposit_after_s: float = 1.0
    cut_denied: bool = False
    runs_commands: bool = False
    state_file: str | None = None
    # As in rinetd.conf: a pid file that cannot be written costs nothing else.
    is_pid_file_optional: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration. ``access`` holds the global access rules, in the order written."""

    rules: tuple[Rule, ...]
    access: tuple[AccessRule, ...] = ()
    settings: Settings = field(default_factory=Settings)

    @property
    def needs_rights(self) -> bool:
        """Whether workers need a capability for the options of sockets."""
        return any(rule.options.needs_rights for rule in self.rules)

    @property
    def binds_to_devices(self) -> bool:
        """Whether a listening socket is bound to a device, which takes a right to change."""
        return any(rule.options.device for rule in self.rules)
