"""Which calls are made to fail, with what, in which process, and what it does meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Doing(Enum):
    """What goes on during a fault, besides the load."""

    LOAD = "load"
    RELOAD = "reload"
    UPGRADE = "upgrade"
    RESIZE = "resize"
    DEATH = "a worker is killed"
    STATUS = "status and sessions"
    ROTATION = "log rotation"


@dataclass(frozen=True)
class Case:
    """A fault. ``is_worker``: in all workers, else in the master. ``when``: see ``strace``."""

    calls: str
    error: str
    when: str
    is_worker: bool = True
    doing: Doing = Doing.LOAD
    may_die: bool = False  # workers, which are replaced

    @property
    def name(self) -> str:
        """For people and for the choice of some."""
        who = "worker" if self.is_worker else "master"
        return f"{who} {self.calls} {self.error} {self.when} {self.doing.value}"


ONCE, OFTEN, ALWAYS = "3", "1+3", "1+"


def _in_workers(calls: str, *errors: str, when: tuple[str, ...] = (ONCE, OFTEN)) -> list[Case]:
    return [Case(calls, error, each) for error in errors for each in when]


def _in_master(
    calls: str, *errors: str, doing: tuple[Doing, ...], when: tuple[str, ...] = ("1", ALWAYS)
) -> list[Case]:
    return [
        Case(calls, error, each, is_worker=False, doing=what)
        for error in errors
        for each in when
        for what in doing
    ]


# Only what a kernel can say: EAGAIN with something there, or EPIPE with a peer there, is a lie that
# nobody could live with.
WORKERS: Final = [
    *_in_workers("splice", "EINTR", "ENOMEM", "EINVAL", "EIO"),
    *_in_workers("splice", "ENOMEM", "EINVAL", when=(ALWAYS,)),
    *_in_workers("accept4", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EPERM", "EINTR", "EIO"),
    *_in_workers("accept4", "EMFILE", when=(ALWAYS,)),
    *_in_workers("socket", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EACCES", "EPERM"),
    *_in_workers("connect", "EAGAIN", "EINTR", "EADDRNOTAVAIL", "ENETUNREACH", "EPERM", "ENOBUFS"),
    *_in_workers("bind", "EADDRINUSE", "EADDRNOTAVAIL", "EACCES", "ENOMEM"),
    *_in_workers("recvfrom", "EINTR", "ENOMEM", "ENOBUFS", "EIO"),
    *_in_workers("sendto", "EINTR", "ENOMEM", "ENOBUFS", "EPERM", "EIO"),
    *_in_workers("recvmmsg", "EINTR", "ENOMEM", "ENOBUFS", "EIO", "ENOSYS"),
    *_in_workers("sendmmsg", "EINTR", "ENOMEM", "ENOBUFS", "EPERM", "EIO", "ENOSYS"),
    *_in_workers("epoll_ctl", "ENOMEM", "ENOSPC", "EPERM"),
    *_in_workers("epoll_wait", "EINTR", "EIO"),
    *_in_workers("epoll_pwait", "EINTR"),
    # libuv ends the process on it, as it cannot be.
    Case("epoll_pwait", "EIO", ONCE, may_die=True),
    *_in_workers("pipe2", "EMFILE", "ENFILE", "EPERM"),
    *_in_workers("pipe2", "EMFILE", when=(ALWAYS,)),
    *_in_workers("fcntl", "EPERM", "EBUSY", "EINVAL"),
    *_in_workers("setsockopt", "ENOMEM", "EPERM", "EINVAL", "ENOBUFS"),
    *_in_workers("getsockname", "ENOBUFS", "ENOTCONN"),
    # Python waits for ever for a thread that had no memory to start: the worker is taken for hung.
    *(Case("mmap", "ENOMEM", when, may_die=True) for when in (ONCE, OFTEN)),
    *_in_workers("write", "ENOSPC", "EIO", "EINTR"),
]
_CHANGES: Final = (Doing.RELOAD, Doing.DEATH)
MASTERS: Final = [
    *_in_master("clone,clone3,fork", "EAGAIN", "ENOMEM", doing=_CHANGES),
    *_in_master("clone,clone3,fork,vfork", "EAGAIN", doing=(Doing.UPGRADE,)),
    *_in_master("socketpair", "EMFILE", "ENFILE", doing=(Doing.DEATH, Doing.RESIZE)),
    *_in_master("memfd_create", "EMFILE", "ENOMEM", doing=_CHANGES),
    *_in_master("mmap", "ENOMEM", doing=_CHANGES),
    *_in_master("ftruncate,fcntl", "ENOMEM", "EPERM", doing=(Doing.DEATH,)),
    *_in_master("sendmsg", "ENOMEM", "ENOBUFS", "ETOOMANYREFS", "EINTR", doing=_CHANGES),
    *_in_master("recvmsg", "ENOMEM", "ENOBUFS", "EINTR", doing=_CHANGES),
    *_in_master("pipe2", "EMFILE", "ENFILE", doing=(Doing.RELOAD, Doing.UPGRADE)),
    *_in_master("socket", "EMFILE", "ENOBUFS", doing=(Doing.RELOAD, Doing.RESIZE)),
    *_in_master("bind", "EACCES", "EADDRINUSE", doing=(Doing.RELOAD, Doing.RESIZE)),
    *_in_master("listen", "EADDRINUSE", "ENOMEM", doing=(Doing.RELOAD, Doing.RESIZE)),
    *_in_master("setsockopt", "ENOMEM", "EPERM", doing=(Doing.RELOAD, Doing.RESIZE)),
    *_in_master("getsockopt,getsockname", "ENOBUFS", doing=(Doing.RELOAD, Doing.STATUS)),
    *_in_master("accept4", "EMFILE", "ENFILE", "EPERM", doing=(Doing.STATUS,)),
    *_in_master("recvfrom", "EINTR", "ENOMEM", doing=(Doing.STATUS,)),
    *_in_master("sendto", "EPIPE", "ENOBUFS", doing=(Doing.STATUS,)),
    *_in_master("epoll_ctl", "ENOMEM", "ENOSPC", doing=(*_CHANGES, Doing.STATUS)),
    *_in_master("epoll_wait", "EINTR", "EIO", doing=(Doing.RELOAD,)),
    *_in_master("openat", "EMFILE", "ENFILE", "EIO", doing=(Doing.ROTATION, Doing.RELOAD)),
    *_in_master("dup,fcntl", "EMFILE", doing=(Doing.ROTATION, Doing.RELOAD)),
    *_in_master("wait4", "EINTR", when=("1",), doing=(Doing.DEATH,)),
    *_in_master("read", "EIO", "EINTR", doing=(Doing.RELOAD,)),
    *_in_master("write", "ENOSPC", "EIO", doing=(Doing.RELOAD,)),
    *_in_master("pwrite64,ftruncate,flock", "EIO", "ENOSPC", doing=(Doing.UPGRADE,)),
    *_in_master("poll", "EINTR", "ENOMEM", doing=(Doing.RELOAD,)),
    *_in_master("execve", "ENOMEM", doing=(Doing.UPGRADE,)),
    *_in_master("kill", "EPERM", doing=(Doing.UPGRADE,)),
]
ALL: Final = [*WORKERS, *MASTERS]
