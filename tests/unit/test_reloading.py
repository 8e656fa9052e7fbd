"""What becomes of a configuration that was read."""

from __future__ import annotations

import selectors
from typing import TYPE_CHECKING

from forwarder.config.model import Config
from forwarder.serving.loader import Candidate
from forwarder.serving.preview import Preview
from forwarder.serving.reloading import Reloading
from forwarder.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

    from forwarder.control.server import Message, Reply


class Master:
    """One that cannot put anything in force, for a bug."""

    is_running, is_upgrading = True, False

    def change_to(self, candidate: Candidate) -> str:
        assert candidate.config.rules == ()
        raise ZeroDivisionError


class Askers:
    """Who has asked for a reload. ``told``: why it was rejected."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_loading(self) -> None:
        """Nothing is read here."""

    def on_rejected(self, problems: Iterable[str]) -> None:
        self.told += problems

    def on_accepted(self, report: str, generation: int) -> None:
        """Nothing is put in force here."""

    def on_refused(self, problems: Iterable[str]) -> None:
        """No worker is there to refuse."""

    def on_unserved(self, problem: str) -> None:
        """No worker is there to refuse."""

    def preview_by(self, handler: Callable[[Message, Reply], None]) -> None:
        """Nobody asks what would change."""


def test_a_bug_while_it_is_put_in_force_is_told_to_who_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else a client would wait for ever, and so would a service manager."""
    config, askers = Config(rules=()), Askers()
    with selectors.DefaultSelector() as selector:
        service = Service(config, lambda: None)
        reloading = Reloading(Master(), service, None, selector, askers, ())
        reloading._end(Candidate(config, {}))
    assert askers.told == ["internal error, see the log"]
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
