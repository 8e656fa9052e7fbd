"""Which server of a group gets a session: shared states of servers, choosers, the choice itself.

In workers, which choose; ``table`` also in the master and the checker, which write there. Connects
to nothing and checks nothing.
"""
