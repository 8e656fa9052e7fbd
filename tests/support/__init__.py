"""Shared parts of the tests: running the command, endpoints that talk, looks into /proc."""
