"""What becomes of a configuration that was read."""

from __future__ import annotations

import selectors
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from forwarder.config.model import Config
from forwarder.serving.loader import Candidate
from forwarder.serving.preview import Preview
from forwarder.serving.reloading import Reloadable, Reloading

if TYPE_CHECKING:
    import pytest

    from forwarder.control.requests import Requests
    from forwarder.control.server import Message
    from forwarder.serving.service import Service


def test_a_bug_while_it_is_put_in_force_is_told_to_who_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else a client would wait for ever, and so would a service manager."""

    def fail(_: Candidate) -> None:
        raise ZeroDivisionError

    told: list[object] = []
    master = SimpleNamespace(is_running=True, change_to=fail)
    service = SimpleNamespace(generation=1, candidate=object)
    requests = SimpleNamespace(on_rejected=told.extend, preview_by=lambda _: None)
    reloading = Reloading(
        cast("Reloadable", master),
        cast("Service", service),
        None,
        cast("selectors.BaseSelector", None),
        cast("Requests", requests),
        (),
    )
    reloading._end(cast("Candidate", object()))
    assert told == ["internal error, see the log"]
    assert "ZeroDivisionError" in caplog.text


def test_who_asks_what_a_reload_would_change_is_told_of_a_stop() -> None:
    """Who waits for a reading, and who waits for the next."""
    answers: list[Message] = []
    config = Config(rules=())
    with selectors.DefaultSelector() as selector:
        preview = Preview(lambda: Candidate(config, {}), lambda: config, selector, ())
        for _ in range(2):
            preview._asked.append(({}, answers.append))
            preview._loading.append(({}, answers.append))
        preview.cancel()
        assert [answer["error"] for answer in answers] == ["the forwarder is stopping"] * 4
        preview.cancel()
    assert len(answers) == 4
