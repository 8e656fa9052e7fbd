"""System calls with their contracts: sockets, options, datagrams, pipes. Decides nothing."""
