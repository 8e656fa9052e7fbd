"""A bug costs what it was about, not the instance."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from forwarder.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# After a failure: if it goes on, it must not fill up the log. Arbitrary.
BUG_PAUSE_S: Final = 0.5


def survive(act: Callable[[], None]) -> None:
    """Call ``act``. A bug in it is logged, and followed by a pause."""
    try:
        act()
    except StartupError:  # a successor that cannot take over
        raise
    except Exception:
        log.exception("master.bug: going on; please report it")
        time.sleep(BUG_PAUSE_S)
