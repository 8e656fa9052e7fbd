"""The configuration: two dialects, one model. ``load`` and ``from_pairs`` are the ways in."""

from forwarder.config.loading import Loaded, load, parse
from forwarder.config.model import Dialect
from forwarder.config.pairs import from_pairs

__all__ = ["Dialect", "Loaded", "from_pairs", "load", "parse"]
