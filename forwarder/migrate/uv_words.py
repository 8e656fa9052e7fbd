"""The words of rinetd-uv 2.1: what they mean here, the same for its two formats. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address, UnixAddress
from forwarder.config.model import Protocol
from forwarder.config.raw import Placed, RawRule
from forwarder.migrate import uv_names
from forwarder.migrate.draft import Remark

if TYPE_CHECKING:
    from forwarder.config.address import Endpoint
    from forwarder.errors import Place
    from forwarder.migrate.draft import Draft
    from forwarder.migrate.uv_names import Names

UDP_TIMEOUT_S: Final = 10.0
MOST_SECONDS: Final = 86400
MOST_FLOWS: Final = 1_000_000
MOST_WAITING: Final = 65535

NO_ADDRESS: Final = "clients of a unix socket have no address, and rinetd-uv does not ask either"
_BUFFERS: Final = "buffers need no setting"
_STATUS: Final = "`forwarder status --json` shows it at any time"
UNKNOWN: Final = "rinetd-uv does not know it either"

# Of the .conf.
CONF_WORDS: Final = {
    "buffersize": _BUFFERS,
    "connect-timeout": "",
    "dns-multi-ip-expand": "",
    "dns-multi-ip-proto": "",
    "dns-refresh": uv_names.REFRESH,
    "include": "",
    "listen-backlog": "",
    "max-udp-connections": "",
    "pool-max-free": _BUFFERS,
    "pool-min-free": _BUFFERS,
    "pool-trim-delay": _BUFFERS,
    "statsloginterval": _STATUS,
    "statusfile": _STATUS,
    "statusformat": _STATUS,
    "statusinterval": _STATUS,
}
"""Words unknown to rinetd 0.73, and why they are left out; "" for those that are not."""

YAML_GLOBAL_GAPS: Final = {
    "buffer_size": _BUFFERS,
    "dns_refresh": uv_names.REFRESH,
    "pool_max_free": _BUFFERS,
    "pool_min_free": _BUFFERS,
    "pool_trim_delay": _BUFFERS,
    "stats_log_interval": _STATUS,
    "status": _STATUS,
}
YAML_BALANCE_GAPS: Final = {"affinity_max_entries": "nothing is kept of clients"}
YAML_UPSTREAM_GAPS: Final = {
    "dns_refresh": uv_names.REFRESH,
    "name": "upstreams are called by their address",
}


def seconds(
    draft: Draft, name: str, value: str, place: Place, *, least: int = 0
) -> Placed[float] | None:
    """A time in whole seconds as rinetd-uv takes it."""
    found = whole(draft, name, value, place, least, MOST_SECONDS)
    return None if found is None else Placed(float(found), place)


def whole(draft: Draft, name: str, value: str, place: Place, least: int, most: int) -> int | None:
    """A whole number within bounds, or an error."""
    is_number = len(value) <= 9 and value.isascii() and value.isdigit()
    if is_number and least <= int(value) <= most:
        return int(value)
    draft.issues.error(
        place, f"{name} is {value[:40]!r}", allowed=f"a whole number from {least} to {most}"
    )
    return None


def mode(draft: Draft, value: str, place: Place, listen: Endpoint) -> Placed[int] | None:
    """Permissions in octal digits. None where rinetd-uv ignores them, too, or after an error."""
    if not (value and set(value) <= set("01234567") and int(value, 8) <= 0o7777):
        draft.issues.error(place, f"mode is {value[:40]!r}", allowed="octal digits, 0 to 7777")
        return None
    number = int(value, 8)
    if not (isinstance(listen, UnixAddress) and listen.path.startswith("/")):
        draft.leave_out(place, f"mode {value}", f"{listen} has no file", in_rule=True)
        return None
    if number > 0o777:
        draft.differ(place, f"mode {value} becomes {number & 0o777:04o}: only permissions count")
    # 0 is "not given", so the umask decides.
    return Placed(number & 0o777, place) if number else None


def flows(draft: Draft, name: str, value: str, place: Place) -> Placed[int] | None:
    """The limit of flows, which every rule has for itself here."""
    found = whole(draft, name, value, place, 1, MOST_FLOWS)
    if found is None:
        return None
    draft.gaps.append(Remark(place, f"# max_flows = {found} in every UDP rule"))
    return Placed(found, place)


def backlog(draft: Draft, name: str, value: str, place: Place) -> None:
    """How many clients may wait."""
    found = whole(draft, name, value, place, 1, MOST_WAITING)
    if found:
        draft.raw.defaults["backlog"] = Placed(found, place)


def keepalive(draft: Draft, rule: RawRule, written: str, place: Place, *, is_on: bool) -> None:
    """Keepalive is on by default, there and here."""
    ends = (rule.listen.value, *(end.value for end in rule.upstream_ends))
    is_tcp = rule.protocol is Protocol.TCP and any(isinstance(end, Address) for end in ends)
    if is_on:
        return
    if is_tcp:
        rule.put("keepalive", Placed(value=False, place=place))
    else:
        draft.leave_out(place, written, "it is for TCP", in_rule=True)


def finish_rule(draft: Draft, rule: RawRule, connect_kind: str, connect_place: Place) -> None:
    """What holds for every rule, once it is read: defaults, and what rinetd-uv ignores."""
    is_udp = rule.protocol is Protocol.UDP
    timeout = rule.keys.get("timeout")
    if is_udp and not (timeout and timeout.value):
        rule.put("timeout", Placed(UDP_TIMEOUT_S, rule.place))
    kind = "udp" if is_udp else "tcp"
    if connect_kind and connect_kind != kind:
        draft.differ(
            connect_place,
            f"the connecting side says {connect_kind} and the listening side {kind}; the rule"
            f" becomes a {kind} rule, as which rinetd-uv runs it",
            hint='for a rule between the two set protocol to "udptotcp" or "tcptoudp"',
        )
    source = rule.keys.get("source_address")
    if source and all(isinstance(there.value, UnixAddress) for there in rule.upstream_ends):
        why = "the upstream is a unix socket"
        draft.leave_out(source.place, f"src {source.value}", why, in_rule=True)
        del rule.keys["source_address"]
    listen = rule.listen.value
    is_file = isinstance(listen, UnixAddress) and listen.path.startswith("/")
    if is_file and "mode" not in rule.keys:
        what = "the socket gets the permissions 0660, not those that the umask leaves"
        draft.differ(rule.listen.place, what, hint="set mode")
    draft.raw.rules.append(rule)


def finish(draft: Draft, place: Place, most_flows: Placed[int] | None, names: Names) -> None:
    """What holds for the whole file; ``place`` is that of the file."""
    uv_names.apply(draft, names)
    for rule in draft.raw.rules:
        if isinstance(rule.listen.value, UnixAddress):
            for entry in rule.access:
                written = f"{entry.verdict.value} {entry.pattern}"
                draft.leave_out(entry.place, written, NO_ADDRESS, in_rule=True)
            rule.access.clear()
        if most_flows and rule.protocol is Protocol.UDP:
            rule.put("max_flows", most_flows)
    if "connect_timeout" not in draft.settings:
        draft.differ(
            place,
            "connecting may take 10 s; rinetd-uv leaves it to the kernel, which gives up after"
            " some two minutes",
            hint="connect_timeout = 0 does so, too",
        )
    if draft.raw.settings.logs:
        log_place = draft.raw.settings.logs[0].place
        what = "times in the connection log are those of rinetd, not ISO 8601 as in rinetd-uv's"
        draft.differ(log_place, what, hint='log_format = "json" has ISO 8601')
    if "pid_file" not in draft.settings:
        draft.differ(
            place,
            "rinetd-uv writes /var/run/rinetd-uv.pid by default, the forwarder no pid file",
            hint="add pid_file if something reads it",
        )
