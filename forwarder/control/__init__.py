"""The control socket of the master: its place, its requests, and when they are answered.

In the master; ``path`` also in the commands that look for it. Carries nothing out: the master does.
"""
