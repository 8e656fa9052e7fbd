"""What the figures are worth: the machine, the kernel, and how busy it was."""

from __future__ import annotations

import os
import platform


def machine() -> str:
    """Describe what the figures are worth: kernel, processors, and how busy it was."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs, load average {load}"
