"""Do the names of the upstreams mean anything now? Asked when a configuration is read.

Blocks as long as the name servers take; the workers' own look-ups never do.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from forwarder.addr import UnixAddress
from forwarder.errors import Issue

if TYPE_CHECKING:
    from forwarder.config.model import Config


def unresolved_names(config: Config) -> list[Issue]:
    """A problem for each rule and upstream whose name has no address; each name is asked once."""
    answers: dict[str, str] = {}
    issues = []
    for rule in config.rules:
        for upstream in rule.upstreams:
            if isinstance(upstream, UnixAddress) or upstream.is_literal:
                continue
            if upstream.host not in answers:
                answers[upstream.host] = _why_not(upstream.host)
            if answers[upstream.host]:
                issues.append(
                    Issue(
                        rule.place,
                        f"rule {rule.name!r}: the upstream {upstream} cannot be resolved: "
                        f"{answers[upstream.host]}",
                        hint="check the name and the name servers (`getent ahosts NAME`)",
                    )
                )
    return issues


def _why_not(host: str) -> str:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:  # UnicodeError: a name that IDNA cannot encode
        return str(err)
    return ""
