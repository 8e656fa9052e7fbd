"""``python -m forwarder``."""

from forwarder.cli.main import main

main()
