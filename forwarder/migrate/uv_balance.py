"""How rinetd-uv spreads sessions over several upstreams: ``load_balancing`` and weights. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.config.model import Balance
from forwarder.config.raw import Placed
from forwarder.migrate import uv_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from forwarder.config.model import Upstream
    from forwarder.config.raw import RawKeys
    from forwarder.errors import Place
    from forwarder.migrate.draft import Draft

MOST_WEIGHT: Final = 100
_MOST_WEIGHT_HERE: Final = 256
_MOST_FAILURES: Final = 100
_MOST_EJECT_S: Final = 300
_MOST_AFFINITY_S: Final = 30 * 86400
_ALGORITHMS: Final = {
    "roundrobin": Balance.TURN,
    "round-robin": Balance.TURN,
    "leastconn": Balance.LEAST,
    "least-conn": Balance.LEAST,
    "random": Balance.RANDOM,
    "iphash": Balance.HASH,
    "ip-hash": Balance.HASH,
}
# What becomes of weights there, by source; its manual says otherwise of "random".
_WEIGHTS_THERE: Final = {
    Balance.LEAST: "rinetd-uv uses it only between upstreams with as many connections",
    Balance.RANDOM: "rinetd-uv ignores it with random",
    Balance.HASH: "rinetd-uv ignores it with iphash",
}
_ALONE: Final = "the rule has one upstream"


def read(draft: Draft, words: Iterable[tuple[str, Place, str]], *, is_alone: bool) -> RawKeys:
    """The keys of a rule for the words of its ``load_balancing``, each with place and value.

    ``is_alone``: the rule has one upstream, with which rinetd-uv balances nothing either.
    """
    keys: RawKeys = {}
    affinity: Placed[str] | None = None
    for word, place, value in words:
        if is_alone:
            draft.leave_out(place, f"{word}: {value}", _ALONE, in_rule=True)
        elif word == "affinity_ttl":
            found = uv_words.whole(draft, word, value, place, 0, _MOST_AFFINITY_S)
            affinity = Placed(value, place) if found else None
        elif placed := _value(draft, word, value, place):
            keys[_KEYS[word]] = placed
    if affinity:
        _stick(draft, keys, affinity)
    return keys


_KEYS: Final = {"algorithm": "balance", "health_threshold": "fail", "recovery_timeout": "eject"}


def _value(
    draft: Draft, word: str, value: str, place: Place
) -> Placed[Balance] | Placed[int] | Placed[float] | None:
    """The value of a key for a word, unless it is wrong or has no equivalent."""
    if word == "algorithm":
        balance = _ALGORITHMS.get(value.lower())
        if balance is None:
            allowed = "roundrobin, leastconn, random, iphash"
            draft.issues.error(place, f"algorithm is {value[:40]!r}", allowed=allowed)
        return Placed(balance, place) if balance else None
    if word == "health_threshold":
        count = uv_words.whole(draft, word, value, place, 1, _MOST_FAILURES)
        if count:
            what = "health_threshold becomes fail: it counts failed connects within 10 s here"
            draft.differ(place, what, hint="fail_within is that time")
        return Placed(count, place) if count else None
    if word == "recovery_timeout":
        seconds = uv_words.seconds(draft, word, value, place, least=1)
        return _eject(draft, seconds) if seconds else None
    why = uv_words.YAML_BALANCE_GAPS.get(word, uv_words.UNKNOWN)
    draft.leave_out(place, f"{word}: {value}", why, in_rule=True)
    return None


def _eject(draft: Draft, seconds: Placed[float]) -> Placed[float]:
    what = "recovery_timeout becomes eject: times how often it was ejected, 5 minutes at most"
    draft.differ(seconds.place, what)
    return Placed(min(seconds.value, float(_MOST_EJECT_S)), seconds.place)


def _stick(draft: Draft, keys: RawKeys, ttl: Placed[str]) -> None:
    """A client goes to one upstream for a time there, and by its address here."""
    balance = keys.get("balance")
    if balance is None or balance.value is not Balance.HASH:
        before = f" in place of {balance.value.value}" if balance else ""  # type: ignore[union-attr]  # a Balance
        draft.differ(
            ttl.place,
            f'affinity_ttl: {ttl.value} becomes balance = "hash"{before}: clients of one address'
            " always go to the same upstream, however long ago they came",
        )
        keys["balance"] = Placed(Balance.HASH, ttl.place)


def joined(draft: Draft, upstreams: Sequence[Placed[Upstream]]) -> tuple[Placed[Upstream], ...]:
    """Upstreams, those that are there twice as one with both weights."""
    found: dict[str, Placed[Upstream]] = {}
    for upstream in upstreams:
        name = str(upstream.value)
        first = found.get(name)
        if first is None:
            found[name] = upstream
            continue
        weight = min(first.value.weight + upstream.value.weight, _MOST_WEIGHT_HERE)
        found[name] = Placed(replace(first.value, weight=weight), first.place)
        what = f"{name} is there already, at {first.place}: it becomes one upstream of both weights"
        draft.differ(upstream.place, what)
    if len(found) > 1:
        return tuple(found.values())
    return tuple(Placed(replace(one.value, weight=1), one.place) for one in found.values())


def report_weights(draft: Draft, upstreams: Sequence[Placed[Upstream]], keys: RawKeys) -> None:
    """Say where weights count here and not there."""
    balance = keys["balance"].value if "balance" in keys else Balance.TURN
    there = _WEIGHTS_THERE.get(balance) if isinstance(balance, Balance) else None
    for upstream in upstreams if there else ():
        if upstream.value.weight != 1:
            what = f"the weight {upstream.value.weight} counts here; {there}"
            draft.differ(upstream.place, what)
