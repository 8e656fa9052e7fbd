"""The process and the system around it: kernel, privileges, signals, pid file, the log to stderr.

In every process. Knows nothing of rules, sessions or workers.
"""
