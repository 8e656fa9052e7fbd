"""The configurations of a run: one rule of every kind, variants of it, and invalid files. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chaos.wire import FLOW_TIMEOUT_S, MOST_LIMITED, PORTS

if TYPE_CHECKING:
    from pathlib import Path

WORKERS: Final = 3
MOST_WORKERS: Final = 5  # that a run ever has
VARIANTS: Final = 6  # of configurations, valid ones and others
HANG_S: Final = 4
RULES: Final = ("plain", "group", "metered", "limited", "to unix", "unix", "udp", "udptotcp")
BASE: Final = 0  # the variant that a run begins and ends with

_HEAD: Final = """\
workers = {workers}
control = "{directory}/control.sock"
pid_file = "{directory}/forwarder.pid"
hang_timeout = {hang_s}
connect_timeout = 8
"""


def _rule(name: str, listen: str, upstream: str, *more: str) -> str:
    lines = [f'name = "{name}"', f'listen = "{listen}"', f"upstream = {upstream}", *more]
    return "[[forwarding_rules]]\n" + "\n".join(lines) + "\n"


def _at(port: int | str) -> str:
    return f'"127.0.0.1:{port}"'


def _span(ports: tuple[int, ...]) -> str:
    return f"{ports[0]}-{ports[-1]}"


def valid(directory: Path, log: Path, variant: int = BASE, workers: int = WORKERS) -> str:
    """One of the configurations; all serve the same clients. ``log`` is on a disk of its own."""
    here, there = PORTS, _at(PORTS.upstream)
    flows = f"timeout = {FLOW_TIMEOUT_S}"
    listen = "127.0.0.1:{}".format
    weight = 3 if variant == 3 else 1
    plain = {1: 'idle_timeout = "1h"', 2: 'half_close_timeout = "2m"', 5: "nodelay = false"}
    servers = f"[{{ at = {there}, weight = {weight} }}, {_at(here.victim)}]"
    check = 'check = { kind = "tcp", every = "500ms", fall = 1 }'
    rules = [
        _rule("plain", listen(here.plain), there, plain.get(variant, "")),
        _rule("metered", listen(here.metered), there, f'bandwidth = "{8 + variant}MB"'),
        _rule("limited", listen(here.limited), there, f"max_sessions = {MOST_LIMITED}"),
        _rule("group", listen(here.group), servers, 'balance = "least"', check),
        _rule("to unix", listen(here.to_unix), f'"unix:{directory}/upstream.sock"'),
        _rule("unix", f"unix:{directory}/listen.sock", there),
        _rule("span", listen(_span(here.span)), _at(_span(here.upstream_span))),
        _rule("udp", listen(here.udp), _at(here.upstream_udp), 'protocol = "udp"', flows),
    ]
    for name, port, to in (
        ("udptotcp", here.udptotcp, here.upstream_raw),
        ("tcptoudp", here.tcptoudp, here.upstream_udp),
    ):
        more = (f'protocol = "{name}"', 'framing = "length"', flows)
        rules.append(_rule(name, listen(port), _at(to), *more))
    if variant in {1, 4}:
        rules.append(_rule("extra", listen(here.extra), there))
    if variant == 4:
        rules.reverse()
    denied = '[[global_rules]]\ntype = "deny"\npattern = "10.9.8.0/24"\n' if variant == 5 else ""
    head = _HEAD.format(directory=directory, workers=workers, hang_s=HANG_S)
    return f'{head}{denied}{"".join(rules)}[[logs]]\nto = "{log}"\nformat = "json"\n'


def invalid(text: str, variant: int) -> str:
    """What ``text`` becomes that no instance may put in force."""
    listen = f'"127.0.0.1:{PORTS.plain}"'
    return (
        text + "this is no TOML\n",
        text.replace("listen", "listne", 1),
        text.replace(listen, '"192.0.2.1:80"'),  # not of this host
        text.replace(listen, f'"127.0.0.1:{PORTS.taken}"'),
        text.replace("max_sessions = ", "max_sessions = -"),
        "",
    )[variant]
