"""Moving bytes between clients and upstreams, in a worker.

``tcp`` has the streams, ``udp`` the flows; here is what both stand on (``poller``, ``wheel``,
``dialer``), what stands above them (``relay``, the listeners), and nothing that decides which
sockets a worker has. Reading order: ``poller``, ``tcp_listener``, ``tcp.session``,
``tcp.direction``, ``tcp.splice``.
"""
