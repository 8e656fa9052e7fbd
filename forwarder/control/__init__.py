"""The control socket of the master: where it is, who may ask what, and when it is answered."""
