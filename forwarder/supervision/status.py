"""What a master reports of its instance, in the JSON of ``forwarder status``."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from forwarder import __version__

if TYPE_CHECKING:
    from forwarder.control.requests import Requests
    from forwarder.serving.service import Service
    from forwarder.succession.handover import Handover
    from forwarder.supervision.checking import Checking
    from forwarder.supervision.fleet import Fleet
    from forwarder.supervision.spec import MasterState
    from forwarder.supervision.upstreams import Upstreams


class Status:
    """The status, put together from the parts of the master."""

    def __init__(  # noqa: PLR0913 - all that know some of it
        self,
        title: str,
        service: Service,
        fleet: Fleet,
        checking: Checking,
        requests: Requests,
        handover: Handover,
        upstreams: Upstreams,
    ) -> None:
        """``title`` names the instance; it is up from now on."""
        self._title = title
        self._service = service
        self._fleet = fleet
        self._checking = checking
        self._requests = requests
        self._handover = handover
        self._upstreams = upstreams
        self._started_at = time.monotonic()

    def describe(self, state: MasterState) -> dict[str, object]:
        """What the instance serves and what it has done."""
        now = time.monotonic()
        rules = self._service.describe_rules(self._fleet.ledger.rule, now)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "title": self._title,
            "state": state.value,
            "generation": self._service.generation,
            "uptime_s": round(now - self._started_at, 1),
            "control": self._requests.path,
            "totals": {**self._fleet.ledger.totals_now(), **self._fleet.keeper.describe()},
            "rates": self._fleet.ledger.rates(now),
            "workers": self._fleet.describe(now),
            "helpers": self._checking.helper.describe(now),
            "rules": self._checking.naming.describe(self._fleet.describe_rules(rules, now), now),
            "groups": self._upstreams.describe(),
            "predecessors": self._handover.describe(),
        }
