"""Sessions that go on in another worker: taken out at rest, described, and put in again.

In a worker. Decides not which sessions move, nor where to: the master does, which passes them on
(``ipc.consignment``) and does not read what is written here.
"""
