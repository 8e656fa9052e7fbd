"""What becomes of a configuration that was read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from forwarder.reloading import Reloadable, Reloading

if TYPE_CHECKING:
    import selectors

    import pytest

    from forwarder.control.requests import Requests
    from forwarder.handover import Handover
    from forwarder.reload import Candidate


def test_a_bug_while_it_is_put_in_force_is_told_to_who_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else a client would wait for ever, and so would a service manager."""

    def fail(_: Candidate) -> None:
        raise ZeroDivisionError

    told: list[object] = []
    master = SimpleNamespace(is_running=True, generation=1, begin_generation=fail)
    requests = SimpleNamespace(on_rejected=told.extend)
    reloading = Reloading(
        cast("Reloadable", master),
        cast("Handover", None),
        None,
        cast("selectors.BaseSelector", None),
        cast("Requests", requests),
        lambda: None,
    )
    reloading._end(cast("Candidate", object()))
    assert told == ["internal error, see the log"]
    assert "ZeroDivisionError" in caplog.text
