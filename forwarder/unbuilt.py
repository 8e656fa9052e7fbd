"""What a configuration may say already and this version cannot do: never skipped silently."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forwarder.config.model import Config

log = logging.getLogger(__name__)


def warn(config: Config) -> None:
    """Warn of settings that have no effect."""
    if config.settings.log_file is not None:
        log.warning(
            "log_file %s: the connection log is not built yet; sessions are logged to stderr "
            "with --verbose",
            config.settings.log_file,
        )
