"""What a configuration may say already and this version cannot do: never skipped silently."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from forwarder.config.model import Protocol
from forwarder.errors import ConfigError, Issue

if TYPE_CHECKING:
    from forwarder.config.model import Config

log = logging.getLogger(__name__)


def refuse(config: Config) -> None:
    """Raise ConfigError for rules that would not work; warn of settings that have no effect."""
    issues = [
        Issue(
            rule.place,
            f"rule {rule.name!r}: protocol {rule.protocol.value} is not built yet",
            allowed="tcp",
            hint="remove the rule or keep the program that serves it today",
        )
        for rule in config.rules
        if rule.protocol is not Protocol.TCP
    ]
    if issues:
        raise ConfigError(issues)
    if config.settings.log_file is not None:
        log.warning(
            "log_file %s: the connection log is not built yet; sessions are logged to stderr "
            "with --verbose",
            config.settings.log_file,
        )
