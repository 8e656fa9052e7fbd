"""What reading a configuration anew can come to; the process around it is tested elsewhere."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.waiting import PATIENCE_S

from forwarder.config.address import Address
from forwarder.config.model import Config, Rule, Upstream
from forwarder.errors import ConfigError, Issue, Place, StartupError
from forwarder.net.sockets import Target
from forwarder.serving import loader
from forwarder.serving.addresses import BindAddress
from forwarder.serving.loader import Candidate, Rejected, _load, as_known, look_up
from forwarder.upstream.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Callable


def config(host: str) -> Config:
    rule = Rule(
        name="rule",
        listen=Address(host, 80),
        upstreams=(Upstream(Address("127.0.0.1", 1)),),
        place=Place("file", 3),
    )
    return Config(rules=(rule,))


def raising(error: BaseException) -> Callable[[], Candidate]:
    def load() -> Candidate:
        raise error

    return load


def test_a_good_configuration_comes_with_its_addresses() -> None:
    good = config("127.0.0.1")
    found = _load(lambda: look_up(good, {}))
    assert isinstance(found, Candidate)
    assert found.config is good
    (addresses,) = found.binds.values()
    (family,) = {address.target.family for address in addresses}
    assert addresses == (BindAddress(Target(family, ("127.0.0.1", 80))),)


def test_every_problem_of_a_bad_one_is_told_on_a_line_of_its_own() -> None:
    issues = [Issue(Place("file", line), f"problem {line}") for line in (1, 2, 3)]
    found = _load(raising(ConfigError(issues)))
    assert found == Rejected(tuple(map(str, issues)))


@pytest.mark.parametrize("error", [KeyError("bug"), RecursionError("deep"), MemoryError()])
def test_a_bug_in_reading_is_told_and_not_raised(error: Exception) -> None:
    found = _load(raising(error))
    assert isinstance(found, Rejected)
    assert repr(error) in found.problems[0]


def test_an_address_that_cannot_be_is_told_with_its_rule_and_place() -> None:
    found = _load(raising(StartupError("file:3: rule 'rule' cannot listen on nowhere:80")))
    assert found == Rejected(("file:3: rule 'rule' cannot listen on nowhere:80",))


FOUND = (Target(socket.AF_INET, ("127.0.0.9", 0)), Target(socket.AF_INET, ("127.0.0.8", 0)))


def test_a_name_to_listen_on_is_each_address_that_is_known_of_it_however_old() -> None:
    for why in ("", "no answer within 8 s"):
        known = {"web.example": Answer(FOUND, why)}
        found = as_known(config("web.example"), known, patient=())
        assert [str(at.target) for at in found.binds["rule"]] == ["127.0.0.9:80", "127.0.0.8:80"]
        assert found.unresolved == {}


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (Target(socket.AF_INET6, ("::ffff:10.0.0.1", 0, 0, 0)), ("10.0.0.1", 80)),
        (Target(socket.AF_INET6, ("fe80::1%eth0.7", 0, 0, 3)), ("fe80::1%eth0.7", 80, 0, 3)),
    ],
)
def test_only_ipv4_in_ipv6_clothes_is_ipv4(found: Target, bound: tuple[object, ...]) -> None:
    """The name of an interface may have a dot, too."""
    candidate = as_known(config("web.example"), {"web.example": Answer((found,))}, patient=())
    assert [at.target.sockaddr for at in candidate.binds["rule"]] == [bound]


@pytest.mark.parametrize("known", [{}, {"web.example": Answer((), "no answer within 8 s")}])
def test_a_name_of_which_nothing_is_known_is_no_error(known: dict[str, Answer]) -> None:
    found = as_known(config("web.example"), known, patient=())
    assert found.binds == {"rule": ()}
    assert "cannot listen on web.example:80: " in found.unresolved["rule"]


def test_a_name_that_means_nothing_is_one_unless_its_rule_may_wait() -> None:
    known = {"web.example": Answer((), "Name or service not known", is_final=True)}
    with pytest.raises(StartupError, match=r"cannot listen on web\.example:80: Name or"):
        as_known(config("web.example"), known, patient=())
    found = as_known(config("web.example"), known, patient=["rule"])
    assert "Name or service not known" in found.unresolved["rule"]


def test_new_names_to_listen_on_are_asked_for_side_by_side_and_known_ones_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty that are silent cost the time of one."""
    asked = []

    def ask(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        threading.Event().wait(PATIENCE_S)
        return []

    hosts = [f"silent{i}.example" for i in range(20)]
    rules = [replace(config(host).rules[0], name=host) for host in (*hosts, "web.example")]
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(loader, "LOOK_UP_S", 0.5)
    known = {"web.example": Answer((), "silent")}
    found = look_up(Config(rules=tuple(rules)), known)
    assert sorted(asked) == sorted(hosts)
    assert found.unresolved.keys() == {*hosts, "web.example"}
    assert set(found.answers) == set(hosts)
