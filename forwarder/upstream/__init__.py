"""Where sessions go: names turned into addresses, and which address is tried first."""
