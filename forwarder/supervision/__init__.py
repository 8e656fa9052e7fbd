"""The children of the master: workers and helpers, from their birth to their end.

In the master. Decides which of them run, and which accept on which sockets; knows nothing of
configurations but the value that it hands on (``serving.generation``), and moves no bytes.
"""
