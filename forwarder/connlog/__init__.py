"""The connection log: a line for each session, in the formats and to the places asked for.

Reading order: ``record`` (what is said of a session), ``formats`` (how it is written), ``sinks``
(on the way, without ever blocking the loop), ``drains`` (where to), ``log`` (all of it for one
worker). ``files`` is the master's part: it opens what the workers write to.
"""
