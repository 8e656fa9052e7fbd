"""Other programs' configurations to our TOML: ``convert`` is the way in, text to text."""

from forwarder.migrate.converting import Converted, Outside, convert
from forwarder.migrate.kinds import Kind, guess

__all__ = ["Converted", "Kind", "Outside", "convert", "guess"]
