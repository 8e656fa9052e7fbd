"""Flows: what one UDP client has with one upstream, by UDP or, framed, by TCP.

In a worker. Receives no first datagram and chooses no upstream: the listener and the dialer do.
"""
