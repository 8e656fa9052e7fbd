"""What becomes of long streams when workers die and programs are reloaded, upgraded and resized.

The forwarder beside HAProxy and nginx: ``python -m bench.survival``.
"""
