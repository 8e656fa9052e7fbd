"""The way in: a text of another program to ours, checked by reading it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.config import Dialect, parse
from forwarder.config.advice import advise
from forwarder.config.resolve import resolve
from forwarder.errors import ForwarderError
from forwarder.migrate import oxidinetd, rinetd, uv_conf
from forwarder.migrate.kinds import Kind
from forwarder.migrate.writer import write

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.errors import Issue
    from forwarder.migrate.draft import Draft
    from forwarder.migrate.uv_conf import Find


# Whose likely mistakes to look for as well.
_DIALECTS: Final = {Kind.RINETD: Dialect.RINETD}


@dataclass(frozen=True, slots=True)
class Outside:
    """What a conversion asks of the system.

    ``service_port``: (name, "tcp" or "udp") to port, raises OSError. ``find``: (pattern, including
    file) to names and texts of files.
    """

    service_port: Callable[[str, str], int]
    find: Find


@dataclass(frozen=True, slots=True)
class Converted:
    """A configuration in our format, and everything that differs from what it was."""

    text: str
    report: tuple[Issue, ...]


class NoYamlError(ForwarderError):
    """PyYAML is not installed."""


def convert(text: str, source: str, kind: Kind, outside: Outside) -> Converted:
    """Convert a configuration. Raises ConfigError with every problem, and NoYamlError."""
    if kind is Kind.OXIDINETD:
        result, draft = oxidinetd.read(text, source)
    else:
        result, draft = "", _read(text, source, kind, outside)
    draft.raw.may_lack_rules = False  # our format does not allow that
    config = resolve(draft.raw, source, draft.issues)
    advice = advise(config, _DIALECTS.get(kind, Dialect.TOML))
    # A rule that has become several is reported once.
    report = tuple(dict.fromkeys((*draft.issues.finish(), *advice)))
    if not result:
        result = write(draft)
    if parse(result, f"{source}, converted", Dialect.TOML).config != config:
        raise AssertionError("the converted configuration is another one")
    return Converted(result, report)


def _read(text: str, source: str, kind: Kind, outside: Outside) -> Draft:
    if kind is Kind.RINETD:
        return rinetd.read(text, source, outside.service_port)
    if kind is Kind.UV_CONF:
        return uv_conf.read(text, source, outside.service_port, outside.find)
    try:
        from forwarder.migrate import uv_yaml  # noqa: PLC0415 - PyYAML may be missing
    except ImportError as error:
        if error.name != "yaml":
            raise
        raise NoYamlError(
            f"{source}: reading YAML needs PyYAML; hint: pip install PyYAML"
        ) from None
    return uv_yaml.read(text, source, outside.service_port)
