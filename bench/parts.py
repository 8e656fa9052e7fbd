"""Which peers are measured how, in parts of a whole run. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.measures import BY_NAME, FLOWS, HELD, RR_SHAPES, STREAMS, USUAL, rr_name
from bench.peers import ON_REQUEST
from bench.rounds import Part

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from bench.peers import Peer

PEERS, BY_STREAMS, BY_SHAPE, BESIDE, GROWTH, MANY_FLOWS = (
    "The peers",
    "By streams",
    "By connections and size",
    "Beside idle sessions",
    "By rules and workers",
    "Many UDP clients",
)
# Who is looked at closer: by the number of streams, of sessions, by sizes.
CLOSER: Final = ("direct", "forwarder", "haproxy", "nginx", "rinetd")
GROWING: Final = ("forwarder-1", "forwarder", "forwarder-4", "forwarder-1000-rules")
# A short run has what the README tells of, against those that are nearest.
SHORT_MEASURES: Final = ("bulk1", "bulk8", "conn", "rr", "udp", "idle1000")
SHORT_PEERS: Final = ("direct", "forwarder", "haproxy", "nginx")


def chosen(
    peers: Mapping[str, Peer],
    measures: Iterable[str],
    names: Container[str],
    rounds: int,
    seconds: int,
    title: str = "Measured",
) -> Part:
    """One part, of measures and peers by name; the peers are in report order."""
    return Part(
        title,
        tuple(BY_NAME[name] for name in measures),
        tuple(peer for name, peer in peers.items() if name in names),
        rounds,
        seconds,
    )


def usual_peers(peers: Mapping[str, Peer]) -> list[str]:
    """Those that are measured when nobody is named."""
    return [name for name in peers if name not in ON_REQUEST]


def whole(peers: Mapping[str, Peer], rounds: int, seconds: int) -> list[Part]:
    """The whole procedure."""
    usual = [measure.name for measure in USUAL]
    held = [f"{name}+{count}" for name in ("bulk8", "rr") for count in HELD]
    held += [f"idle{count}" for count in HELD[1:]]
    fewer = max(1, rounds // 2)  # where a curve is looked at, not a point
    everyone = usual_peers(peers)
    udp = [name for name in everyone if name != "direct" and peers[name].has_udp]
    return [
        chosen(peers, measures, names, count, seconds, title)
        for title, measures, names, count in (
            (PEERS, usual, everyone, rounds),
            (BY_STREAMS, [f"bulk{n}" for n in STREAMS], CLOSER, fewer),
            (BY_SHAPE, [rr_name(*shape) for shape in RR_SHAPES], CLOSER, fewer),
            (BESIDE, held, CLOSER[1:], rounds),
            (GROWTH, ("bulk8", "conn", "rr"), GROWING, rounds),
            (MANY_FLOWS, [measure.name for measure in FLOWS], udp, fewer),
        )
    ]
