"""The messages between the processes of one instance, and how they travel.

In master, workers and helpers. Gives messages no meaning: their senders and receivers do.
"""
