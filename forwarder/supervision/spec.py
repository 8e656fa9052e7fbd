"""What a master is born with, and the states of its life."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.model import Config


class MasterState(Enum):
    """BOOTING -> RUNNING -> DRAINING -> STOPPING -> STOPPED; a fast stop skips DRAINING."""

    BOOTING = "booting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterSpec:
    """What the command line decided.

    ``config`` is the first configuration; its ``settings.workers`` is not 0.
    ``title`` names it in the process list. ``load`` reads it again for a reload, under the same
    command line; it runs in a process of its own and may block and raise. None: nothing to reload.
    ``has_control``: whether there is a control socket, at ``settings.control`` or a default place.
    """

    config: Config
    title: str
    load: Callable[[], Config] | None = None
    has_control: bool = False
