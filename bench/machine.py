"""What the figures are worth: the machine, the kernel, and how busy it was."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def processor() -> str:
    """The name of the processor, as /proc/cpuinfo has it on x86; else the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def memory_gib() -> float:
    """The memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def kernel() -> str:
    """Its name and version."""
    return f"{platform.system()} {platform.release()}"


def load_average() -> str:
    """Over 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


def machine() -> str:
    """One line for a report."""
    return f"{kernel()}, {os.cpu_count()} CPUs, load average {load_average()}"


def loads() -> str:
    """The versions of the load generators that are here; ours have that of the compiler."""
    commands = (("iperf3", "--version"), ("ab", "-V"), ("gcc", "--version"))
    said = (first_line(command) for command in commands if shutil.which(command[0]))
    return "; ".join(line for line in said if line)


def first_line(command: Sequence[str]) -> str:
    """The first line of what a program says, empty when nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    lines = (done.stdout + done.stderr).splitlines()
    return lines[0] if done.returncode == 0 and lines else ""
