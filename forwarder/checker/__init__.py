"""The checker: the helper that checks servers, looks names up, and says which servers are usable.

One child of the master for all workers, without rights and without clients: forwarding goes on
without it. Writes the table of servers (``balancing.table``); chooses no server.
"""
