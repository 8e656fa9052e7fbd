"""A TCP/UDP port forwarder in which the kernel moves the bytes and Python decides."""

__version__ = "0.1.0"
# What pip and pipx call it; on PyPI `forwarder` is another project's.
DISTRIBUTION = "splice-forwarder"
