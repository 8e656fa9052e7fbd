"""Memory that processes share by a file that has no name (memfd_create(2)). Knows no content.

Unlike anonymous memory it can be handed to a process that was not forked from the one that made it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from forwarder.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIZED: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# F_SEAL_FUTURE_WRITE, which Python does not name. Linux 5.1.
_NO_NEW_WRITER: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def check_limit(size: int) -> None:
    """Refuse a limit of file sizes that leaves no room for ``size`` bytes. Raises StartupError.

    The limit is for all files, those in memory, too; :func:`make` raises it as far as it may.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hard != resource.RLIM_INFINITY and hard < size:
        raise StartupError(
            f"memory that processes share takes {size} bytes, the limit of file sizes is {hard}; "
            "hint: raise the limit (LimitFSIZE=, ulimit -f)"
        )


def make(name: str, size: int) -> int:
    """Make a file of ``size`` bytes, all 0, and return its descriptor, which the caller closes.

    Its size is sealed: a file that becomes shorter would kill all who have mapped it (SIGBUS). Its
    pages exist once they are touched. Raises OSError.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with _file_sizes_up_to(size):
            os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZED)
    except OSError:
        os.close(fd)
        raise
    return fd


@contextmanager
def _file_sizes_up_to(size: int) -> Iterator[None]:
    """Have the limit of file sizes, if it is lower, as high as it may be meanwhile.

    It is meant for logs and the like, and holds for this whole process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY or soft >= size:
        yield
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def words_of(fd: int, size: int, *, writable: bool) -> memoryview[int]:
    """Map a file as numbers of 8 bytes; the mapping lives as long as anything refers to it.

    ``mmap`` of Python would keep a descriptor of its own beside it: one more for each worker, and
    one that :func:`children.keep_only` closes behind its back. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    rights = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    at = libc.mmap(None, size, rights, mmap.MAP_SHARED, fd, 0)
    if at is None or at == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    array = (ctypes.c_char * size).from_address(at)
    weakref.finalize(array, libc.munmap, at, size).atexit = False
    view = memoryview(array).cast("B").cast("Q")
    return view if writable else view.toreadonly()


def keep_writers_out(fd: int) -> None:
    """Let nobody write but by the mappings that exist now, whatever descriptor and rights he has.

    A descriptor that was opened for reading does not do that: it can be opened again for writing,
    through /proc. Before Linux 5.1 this does nothing.
    """
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _NO_NEW_WRITER)


def is_made(fd: int, size: int) -> bool:
    """Whether a descriptor is a file that :func:`make` has made, of this size; False if none."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        return seals & _SIZED == _SIZED and os.fstat(fd).st_size == size
    except (OSError, OverflowError):
        return False
