"""The configuration: two dialects, one model. ``load`` and ``from_pairs`` are the ways in."""

from forwarder.config.loading import Loaded, from_pairs, load, parse
from forwarder.config.model import Dialect

__all__ = ["Dialect", "Loaded", "from_pairs", "load", "parse"]
