"""A load that checks every byte, and a monkey that does what it can: ``make chaos``."""
