"""Limits on sessions and bandwidth that hold for all workers together.

In workers; the master makes the shared memory and clears what a dead worker has left in it. Ends
no session: it says whether there is room, and for how many bytes.
"""
