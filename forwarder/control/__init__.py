"""The control socket of the master: its place, its requests, and when they are answered."""
