"""System calls with their contracts: sockets, options, datagrams, pipes.

In every process. Decides nothing, and knows of rules only the options of their sockets.
"""
