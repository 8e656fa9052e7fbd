"""How servers are asked: one module for each kind of check, each with a function ``begin``.

They run in the checker, on its loop, and never block it, whatever a server does. ``readers`` says
what an answer means, ``why`` what to say of a failure; both are pure. Decides nothing about servers
and keeps nothing of them: that is ``checker.standing``.
"""
