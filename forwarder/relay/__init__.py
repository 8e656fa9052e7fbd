"""Moving bytes between a client and its upstream inside one worker.

Reading order: ``poller`` (events), ``listener`` (accept), ``session`` (connect, timers, end),
``direction`` (one way of a session, by copying), ``splice`` (the same without copies).
"""
