"""What is found by trying, on a system that has it and on one that has not."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Final

import pytest

from forwarder.cli import features

if TYPE_CHECKING:
    from collections.abc import Callable

PROBES: Final = [
    features.has_splice,
    features.has_reuseport,
    features.has_segment,
    features.has_gro,
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_kernel_of_today_has_it(probe: Callable[[], bool]) -> None:
    assert probe()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_kernel_that_refuses_has_it_not(
    probe: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOPROTOOPT, "not here")

    class OldSocket(socket.socket):
        def setsockopt(self, *_: object) -> None:
            raise OSError(errno.ENOPROTOOPT, "not here")

    monkeypatch.setattr(os, "splice", refuse)
    monkeypatch.setattr(socket, "socket", OldSocket)
    assert not probe()
