"""Which names of a configuration have no address here and now. For commands; blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.address import SRV
from forwarder.errors import Issue
from forwarder.upstream.lookup import look_up_all
from forwarder.upstream.wanted import all_names

if TYPE_CHECKING:
    from forwarder.config.model import Config

# For all names together, since they are looked up side by side. More than the 5 s after which the
# second name server is asked, resolv.conf(5).
PATIENCE_S: Final = 6.0
_HINT: Final = "check the name and the name servers (`getent ahosts NAME`)"
_HINT_OF_SERVICES: Final = "check the name and the name servers (`dig NAME SRV`)"


def unresolved_names(config: Config) -> list[Issue]:
    """A warning for each rule and name of it that has no address now.

    Blocks PATIENCE_S at most.
    """
    names = all_names(config.rules)
    answers = look_up_all(names, PATIENCE_S) if names else {}
    places = {rule.name: rule.place for rule in config.rules}
    return [
        Issue(
            places[rule],
            f"rule {rule!r}: the name {host} has no "
            f"{'servers' if host.startswith(SRV) else 'address'}: {answer.why}",
            hint=_HINT_OF_SERVICES if host.startswith(SRV) else _HINT,
            is_warning=True,
        )
        for host, answer in answers.items()
        if answer.why
        for rule in names[host]
    ]
