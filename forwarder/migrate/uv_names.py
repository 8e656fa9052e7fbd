"""Names with several addresses in rinetd-uv: ``dns-multi-ip-expand`` and its like. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from forwarder.config.raw import Placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.config.address import Endpoint
    from forwarder.config.model import Upstream
    from forwarder.errors import Place
    from forwarder.migrate.draft import Draft

REFRESH: Final = (
    "names are looked up again as often as their TTL says, with the extra dns; else every 30 s"
)
_FAMILIES: Final = {"ipv4": "of IPv4", "ipv6": "of IPv6", "any": ""}
_FAMILY_FORMS: Final = "ipv4, ipv6 or any"
_ALL: Final = "all addresses of a name are tried, beginning with the first"
_BOTH: Final = "addresses of both families are used"
_EXTRA: Final = "pip install 'splice-forwarder[dns]', so that their TTL is honoured"


@dataclass(slots=True)
class Names:
    """What a file says of names, each as its format writes it, with its place.

    ``expands``: whether each address of a name is an upstream of its own. ``remark``: what else to
    say of that.
    """

    expands: bool
    remark: str = ""
    written: Placed[str] | None = None
    family: str = "ipv4"
    family_written: Placed[str] | None = None

    def set_expands(self, written: str, place: Place, *, is_on: bool) -> None:
        """Note whether names are expanded."""
        self.expands, self.written = is_on, Placed(written, place)

    def set_family(self, draft: Draft, word: str, written: str, place: Place) -> None:
        """Note which addresses of names are upstreams."""
        family = word.lower()
        if family not in _FAMILIES:
            draft.issues.error(place, f"{written[:60]!r} names no family", allowed=_FAMILY_FORMS)
            return
        self.family, self.family_written = family, Placed(written, place)

    def stands_for_several(self, upstreams: Sequence[Placed[Upstream]]) -> bool:
        """Whether some of these may be several servers."""
        return self.expands and any(_is_name(upstream.value.end) for upstream in upstreams)


def _is_name(end: Endpoint) -> bool:
    return not end.is_literal


def apply(draft: Draft, names: Names) -> None:
    """Expand the names of all rules, and say what differs."""
    first: Placed[Upstream] | None = None
    for rule in draft.raw.rules if names.expands else ():
        found = [upstream for upstream in rule.upstreams if _is_name(upstream.value.end)]
        first = first or next(iter(found), None)
        rule.upstreams = tuple(
            Placed(replace(upstream.value, expands=True), upstream.place)
            if upstream in found
            else upstream
            for upstream in rule.upstreams
        )
    if first is None:
        for written, why in ((names.written, _ALL), (names.family_written, _BOTH)):
            if written is not None:
                draft.leave_out(written.place, written.value, why)
        return
    what = "each address of a name becomes a server (expand), and they share its weight"
    if of_family := _FAMILIES[names.family]:
        what += f"; in rinetd-uv each of those {of_family}, with the whole weight"
    if names.remark:
        what += f"; {names.remark}"
    place = names.written.place if names.written else first.place
    draft.differ(place, what, hint=_EXTRA)
