"""From one master to the next: upgrades, sockets that survive a master, sessions that it leaves.

In both masters of an upgrade; ``orphans`` also in workers whose master has died. Decides nothing
about what is served.
"""
