"""What workers say of addresses that fail: it fits into a message, and is not trusted."""

from __future__ import annotations

import json
import math

import pytest

from forwarder.config.address import UnixAddress, parse_listen
from forwarder.config.model import Rule, Upstream
from forwarder.errors import Place
from forwarder.ipc.channel import MAX_MESSAGE_BYTES, channel_pair
from forwarder.net.sockets import unix_target
from forwarder.stats.rows import new_row
from forwarder.upstream.failing import Failing, describe, of_pools, read
from forwarder.upstream.names import Names
from forwarder.upstream.pool import Pool


@pytest.mark.parametrize("letter", ["x", "ü", "🦆"])
def test_however_long_names_and_paths_are_what_fails_can_be_said(letter: str) -> None:
    """As much of it as fits."""
    names = Names(lambda _: None, lambda: 0.0)
    pools = []
    for number in range(100):
        end = UnixAddress("/" + letter * (100 // len(letter.encode())))
        rule = Rule(
            name=f"{letter * 97}{number}",
            listen=parse_listen("127.0.0.1:80"),
            upstreams=(Upstream(end),),
            place=Place("file"),
        )
        pools.append(Pool(rule, names, number, new_row()))
        pools[-1].failures.note(unix_target(end.path), "Connection refused" * 10, 1.0)
    found = of_pools(pools, 2.0)
    assert found
    ours, theirs = channel_pair()
    ours.send({"op": "failing", "failing": found})
    (heard,) = theirs.receive()
    assert read(heard.message) == found
    assert len(json.dumps(heard.message)) > MAX_MESSAGE_BYTES // 2
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "time", [1 << 60, 10**400, math.inf, math.nan, -1, "1", None], ids=range(7)
)
def test_a_time_that_is_none_is_nonsense(time: object) -> None:
    """It would be the end of every status."""
    for since, last in ((time, 1.0), (1.0, time)):
        with pytest.raises(TypeError):
            read({"failing": [["web", "10.0.0.1:80", "why", since, last]]})


def test_the_status_has_what_any_worker_says_of_a_rule() -> None:
    said = [[Failing("web", "a", "old", 1.0, 2.0)], [Failing("web", "a", "new", 1.5, 3.0)]]
    (rule,) = describe([{"name": "web"}], said, 5.0)
    assert rule["failing"] == [{"upstream": "a", "why": "new", "since_s": 4.0, "last_s": 2.0}]
