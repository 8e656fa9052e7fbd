"""Where sessions go: names turned into addresses, and which address is tried first.

In workers (``pool``, ``names``, ``failures``), in the helper that looks names up (``process``,
``lookup``, ``schedule``) and in the master, which keeps the last answers (``known``, ``failing``).
Connects nothing: ``relay.dialer`` does.
"""
