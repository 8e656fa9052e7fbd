"""Groups of servers: what the forwarder, HAProxy and nginx make of the same troubles.

``python -m bench.groups``; see bench/README.md. A scenario is one module. What a run says is worked
out by ``findings``, which touches nothing.
"""
