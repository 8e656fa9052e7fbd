"""Sessions whose client speaks TCP or connects to a unix socket: two directions, copied or spliced.

In a worker. Accepts no client and chooses no upstream: the listener and the dialer do.
"""
