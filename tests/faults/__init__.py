"""What each fault of the kernel costs: ``make faults``."""
