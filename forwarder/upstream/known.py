"""What the master knows of names: the last answers, and which changed since a revision. Pure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from forwarder.upstream.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Collection


class KnownNames:
    """The last known answer for each name. ``revision`` grows with each change of one.

    ``hurried`` are names that a worker wants looked up soon.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.hurried: set[str] = set()
        self.revision = 0
        self._changed: dict[str, int] = {}

    def put(self, host: str, answer: Answer) -> Answer:
        """Note the outcome of a look-up. Returns what is known of the name now."""
        known = self.answers.get(host)
        answer = answer.after(known)
        if answer != known:
            self.revision += 1
            self.answers[host] = answer
            self._changed[host] = self.revision
        return answer

    def keep(self, hosts: Collection[str]) -> None:
        """Forget all names but these."""
        for host in self.answers.keys() - hosts:
            del self.answers[host], self._changed[host]
        self.hurried.intersection_update(hosts)

    def hurry(self, hosts: Collection[str]) -> None:
        """Note that a worker wants names looked up soon; unknown ones are ignored."""
        self.hurried.update(self.answers.keys() & hosts)

    def as_text(self) -> bytes:
        """All answers, for a successor."""
        return json.dumps({host: one.as_json() for host, one in self.answers.items()}).encode()

    def take(self, text: bytes) -> None:
        """Take in what a predecessor wrote by :meth:`as_text`. Raises ValueError, TypeError."""
        for host, value in json.loads(text or b"{}").items():
            self.put(host, Answer.from_json(value))

    def since(self, revision: int) -> dict[str, Answer]:
        """What has changed since a revision; 0 is from the beginning."""
        return {host: self.answers[host] for host, at in self._changed.items() if at > revision}
