"""What processes of one instance say to each other, and how it travels.

In master, workers and helpers. Gives no message a meaning: its sender and its receiver do.
"""
