"""Other programs' configurations to our TOML: ``convert`` is the way in, text to text.

In the command of that name. Knows no running instance and opens no file.
"""

from forwarder.migrate.converting import Converted, Outside, convert
from forwarder.migrate.kinds import Kind, guess

__all__ = ["Converted", "Kind", "Outside", "convert", "guess"]
