"""``python -m forwarder``."""

from forwarder.cli import main

main()
