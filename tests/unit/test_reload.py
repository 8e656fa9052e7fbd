"""What reading a configuration anew can come to; the process around it is tested elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from forwarder.addr import Address
from forwarder.config.model import Config, Rule
from forwarder.errors import ConfigError, Issue, Place, StartupError
from forwarder.net.addresses import BindAddress
from forwarder.net.sockets import Target
from forwarder.reload import Candidate, Rejected, _load

if TYPE_CHECKING:
    from collections.abc import Callable


def config(host: str) -> Config:
    rule = Rule(
        name="rule",
        listen=Address(host, 80),
        upstreams=(Address("127.0.0.1", 1),),
        place=Place("file", 3),
    )
    return Config(rules=(rule,))


def raising(error: BaseException) -> Callable[[], Config]:
    def load() -> Config:
        raise error

    return load


def test_a_good_configuration_comes_with_its_addresses() -> None:
    good = config("127.0.0.1")
    found = _load(lambda: good)
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
