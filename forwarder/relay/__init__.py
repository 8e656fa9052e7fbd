"""Moving bytes between clients and upstreams, in a worker.

``tcp`` has the streams, ``udp`` the flows; here is what both stand on (``workbench``,
``session``, ``dialer``) and what stands above them (``relay``, the listeners). Nothing here
decides which sockets a worker has. Reading order: ``poller``, ``tcp_listener``, ``tcp.session``,
``tcp.direction``, ``tcp.splice``.
"""
