"""What the servers, the keys and the check of one group mean together. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.config.address import Address, UnixAddress
from forwarder.config.address_checks import spelling
from forwarder.config.model import Balance, CheckKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from forwarder.config.model import Group, Upstream
    from forwarder.config.raw import Issues, Placed, RawCheck, RawKeys
    from forwarder.errors import Place


def check_group(
    group: Group,
    servers: Sequence[Placed[Upstream]],
    keys: RawKeys,
    check: RawCheck | None,
    issues: Issues,
) -> None:
    """Report what is impossible, and warn of what does nothing.

    ``group`` is what ``keys``, those that it has itself, and ``check`` have become.
    """
    _check_servers(servers, issues)
    _check_together(group, keys, issues)
    for key, why in _without_effect(group, [server.value for server in servers]):
        if key in keys:
            issues.warn(keys[key].place, f"{key} has no effect {why}", hint="leave it out")
    if check and not check.is_broken:
        _check_check(check, servers, issues)


def _check_servers(servers: Sequence[Placed[Upstream]], issues: Issues) -> None:
    first: dict[tuple[str, int, int], Place] = {}
    for server in servers:
        end = server.value.end
        ports = (end.port, end.ports) if isinstance(end, Address) else (0, 0)
        place = first.setdefault((spelling(end), *ports), server.place)
        if place is not server.place:
            issues.error(
                server.place,
                f"{end} is there already, at {place}",
                hint=f'take one out; {{ at = "{end}", weight = 2 }} gets twice as many sessions',
            )
    if len(servers) == 1:
        return
    if all(server.value.is_backup for server in servers):
        issues.error(
            servers[0].place,
            "all servers are backups, of nothing",
            allowed="one or more without backup",
            hint="leave backup out",
        )
    elif not any(server.value.weight for server in servers):
        issues.error(
            servers[0].place,
            "all servers have the weight 0, so none gets sessions",
            allowed="one or more with a weight above 0",
            hint="`forwarder upstream drain` keeps new sessions from a server for a time",
        )
    elif not any(server.value.weight for server in servers if not server.value.is_backup):
        issues.warn(
            servers[0].place,
            "all servers but backups have the weight 0, so backups get all sessions",
            hint="leave backup out",
        )


def _check_together(group: Group, keys: RawKeys, issues: Issues) -> None:
    if group.panic and not group.fails_open and "panic" in keys:
        issues.error(
            keys["panic"].place,
            f"panic = {group.panic} with fail_open = false: the one uses all servers when few are"
            " usable, the other none when none is",
            hint="leave one of the two out",
        )


def _without_effect(group: Group, servers: Sequence[Upstream]) -> Iterator[tuple[str, str]]:
    """Keys that would do nothing, and in which way."""
    is_checked = group.check is not None
    if group.balance is not Balance.HASH:
        yield "hash_prefix", 'without balance = "hash"'
    is_told = group.check is not None and group.check.kind is CheckKind.AGENT
    if group.max_queue and not (is_told or any(server.max_sessions for server in servers)):
        yield "max_queue", "without max_sessions of a server"
    if not group.max_queue:
        yield "queue_timeout", "without max_queue"
    if not group.fail:
        yield "fail_within", "with fail = 0"
        yield "eject", "with fail = 0"
    if not is_checked:
        yield "on_down", "without a check, as failed connects end no sessions"
    has_members = any(server.is_several for server in servers)
    if len(servers) == 1 and not group.name and not has_members:
        yield from _without_effect_alone(is_checked=is_checked)
    elif not any(server.is_backup for server in servers) and not has_members:
        yield "on_up", "without a server that is a backup"


def _without_effect_alone(*, is_checked: bool) -> Iterator[tuple[str, str]]:
    for key in ("balance", "panic", "on_up"):
        yield key, "with one upstream"
    for key in () if is_checked else ("fail", "fail_open", "slow_start"):
        yield key, "with one upstream that is not checked, as it is always used"


def _check_check(check: RawCheck, servers: Sequence[Placed[Upstream]], issues: Issues) -> None:
    kind, port = check.check.kind, check.check.port
    if kind is CheckKind.COMMAND:
        return
    for server in servers:
        end = server.value.end
        if isinstance(end, UnixAddress) and (port or kind is CheckKind.UDP):
            what = f"port {port}" if port else 'kind = "udp"'
            issues.error(
                check.place,
                f"a check with {what} of {end}, which is a unix socket",
                hint="leave it out, or give the unix socket a group of its own",
            )
        elif isinstance(end, Address) and end.ports > 1 and not port:
            issues.error(
                check.place,
                f"a check of {end}, which has {end.ports} ports, does not say of which",
                hint=f"add port = {end.port}",
            )
