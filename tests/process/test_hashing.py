"""Clients keep their server, whichever worker, instance or configuration serves them."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

import pytest
from support.configured import Configured
from support.echo import Echo, ask_tcp
from support.ends import written
from support.forwarder import reserve_port
from support.hosts import own_host
from support.upgraded import Site

from forwarder.balancing.choose import Hash, mask_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

SERVERS: Final = 10
CLIENTS: Final = [own_host(number) for number in range(100, 160)]


@pytest.fixture
def servers() -> Iterator[list[str]]:
    """Servers, as they are configured."""
    with Echo(tcp=[(own_host(10 + number), 0) for number in range(SERVERS)]) as echo:
        yield [written(address) for address in echo.tcp]


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    """Where the hashing rule listens."""
    with reserve_port() as holder:
        yield holder.getsockname()


def hashing(listen: tuple[str, int], servers: Sequence[str], name: str = "web") -> str:
    """The rule."""
    texts = ", ".join(f'"{one}"' for one in servers)
    return (
        f'[[forwarding_rules]]\nname = "{name}"\nlisten = "{written(listen)}"\n'
        f'upstream = [{texts}]\nbalance = "hash"\n'
    )


def found_at(address: tuple[str, int]) -> dict[str, str]:
    """Which server each client gets."""
    return {client: ask_tcp(address, source=client).partition(" saw ")[0] for client in CLIENTS}


def expected(servers: Sequence[str]) -> dict[str, str]:
    """The same as the chooser has it, which has golden values of its own."""
    chooser = Hash(servers)
    chooser.reweigh([1] * len(servers))
    everyone = mask_of([1] * len(servers))
    return {
        client: servers[chooser.pick(everyone, ip_address(client).packed)] for client in CLIENTS
    }


def test_clients_keep_their_server(
    site: Site, address: tuple[str, int], servers: list[str], launch: Launch, tmp_path: Path
) -> None:
    """Over reloads, other numbers of workers, an upgrade, and in a second instance."""
    more = hashing(address, servers)
    site.start(workers=2)
    site.config.write_text(site.text(more=more))
    it = Configured(site.forwarder, site.config)
    it.reload_as_it_is()
    mapping = found_at(address)
    assert mapping == expected(servers)
    assert len(set(mapping.values())) > SERVERS // 2
    it.resize(signal.SIGTTIN, 3)
    assert found_at(address) == mapping
    it.reload(site.text(more=more + "# the same\n"))
    assert found_at(address) == mapping
    # Another place of the servers in the list, and another name of the rule, are of no account.
    it.reload(site.text(more=hashing(address, servers[::-1], "other")))
    assert found_at(address) == mapping
    site.upgrade()
    assert found_at(address) == mapping
    with reserve_port() as holder:
        second = tmp_path / "second.toml"
        second.write_text("workers = 1\n" + hashing(holder.getsockname(), servers))
        launch("-c", str(second))
        assert found_at(holder.getsockname()) == mapping


def test_a_server_that_goes_takes_only_its_clients_along(
    site: Site, address: tuple[str, int], servers: list[str]
) -> None:
    """Whether it is drained or no longer in the file; and they come back to it."""
    everyone = hashing(address, servers)
    site.start(workers=2)
    site.config.write_text(site.text(more=everyone))
    it = Configured(site.forwarder, site.config)
    it.reload_as_it_is()
    before = found_at(address)
    gone = before[CLIENTS[0]]
    assert site.run("upstream", "drain", "web", gone).returncode == 0
    drained = found_at(address)
    for client, server in before.items():
        assert (drained[client] == server) == (server != gone)
    it.reload(site.text(more=hashing(address, [one for one in servers if one != gone])))
    assert found_at(address) == drained
    it.reload(site.text(more=everyone))
    assert site.run("upstream", "enable", "web", gone).returncode == 0
    assert found_at(address) == before
