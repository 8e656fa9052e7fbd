"""A TCP/UDP port forwarder in which the kernel moves the bytes and Python decides."""

__version__ = "0.1.0"
