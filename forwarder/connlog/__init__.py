"""The connection log: a line for each session, in the formats and places of the configuration.

In workers, whose loop only appends records: threads format and write them. Not the program's own
log, which is ``system.daemonlog``.

Reading order: ``record`` (the facts of a session), ``formats`` (how they are written), ``sinks``
(lines on their way, without blocking the loop), ``drains`` (where they go), ``log`` (all of it for
one worker). ``files`` is the master's part: it opens what the workers write to.
"""
