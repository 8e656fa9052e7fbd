"""System calls with their contracts: sockets, pipes, the control channel. Decides nothing."""
