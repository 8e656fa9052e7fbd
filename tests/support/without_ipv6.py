"""Execute a command to which socket(2) says that there is no IPv6, as after ``ipv6.disable=1``.

The kernel is told by seccomp(2); no namespace or setting can do that at run time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from typing import Final

# asm/unistd.h, linux/audit.h; linux/seccomp.h and linux/prctl.h.
_NUMBERS: Final = {"x86_64": (41, 0xC000003E), "aarch64": (198, 0xC00000B7)}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
IS_POSSIBLE: Final = platform.machine() in _NUMBERS


def forbid() -> None:
    """From now on, for this process and what it executes. Raises OSError."""
    number, architecture = _NUMBERS[platform.machine()]
    lines = (
        (0x20, 0, 0, 4),  # the architecture
        (0x15, 0, 4, architecture),
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 0, 2, number),
        (0x20, 0, 0, 16),  # its first argument
        (0x15, 1, 0, socket.AF_INET6),
        (0x06, 0, 0, _ALLOW),
        (0x06, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
