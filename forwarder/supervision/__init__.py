"""The children of the master: workers and helpers, from their birth to their end.

In the master. Decides who runs and who accepts on which sockets; knows nothing of configurations
but the value that it hands on (``serving.generation``), and moves no bytes.
"""
