"""Measurements of the forwarder beside its peers. Not part of the package, not run in CI."""
