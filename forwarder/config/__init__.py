"""The configuration: two dialects, one model. ``load`` and ``from_pairs`` are the ways in.

Values, for every process. Reads files and looks up services; binds and connects nothing.
"""

from forwarder.config.loading import Loaded, load, parse
from forwarder.config.model import Dialect
from forwarder.config.pairs import from_pairs

__all__ = ["Dialect", "Loaded", "from_pairs", "load", "parse"]
