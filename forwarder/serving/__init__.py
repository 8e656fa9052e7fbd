"""What is served: the configuration in force, its listening sockets, and how it is replaced.

In the master; the configuration itself is read in a process that lives for one reload. Starts and
watches no worker: ``supervision`` does.
"""
