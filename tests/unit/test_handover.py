"""What an old master still does for the one that serves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from forwarder.handover import Handover

if TYPE_CHECKING:
    import selectors

    import pytest

    from forwarder.control.requests import Requests
    from forwarder.handover import Incumbent


def test_a_reload_is_passed_on_to_the_heir_as_long_as_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it was reaped its number may be another's."""
    handover = Handover(
        cast("Incumbent", None), cast("selectors.BaseSelector", None), cast("Requests", None)
    )
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    handover._has_heir, handover._heir = True, 12345
    handover.note_reload()
    assert killed == [12345]
    handover.on_exit(12345, 0)
    handover.note_reload()
    assert killed == [12345]
    assert handover.has_heir
