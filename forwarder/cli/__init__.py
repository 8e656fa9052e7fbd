"""The commands: options to settings, answers to text, errors to exit codes.

In the process of a command; ``run`` becomes the master. Serves nothing itself: a command asks a
running instance over its control socket.
"""
