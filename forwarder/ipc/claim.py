"""Who goes on with sessions that are on their way: who claims them first, whatever is killed.

Each consignment brings a token, an eventfd(2) that holds 0. Who claims it writes a number so large
that no other one fits in beside it. So of all who have the token one gets it, in the kernel: the
taker before it answers TAKEN, or the giver when nobody is left to say what became of the
consignment. Which of them it was the number says. Knows no sessions. Never blocks.
"""

from __future__ import annotations

import os
import stat
from enum import IntEnum

# Of an eventfd: more is EAGAIN.
_MOST = (1 << 64) - 2


class Claimant(IntEnum):
    """Who has claimed: the giver of the sessions, or another process that has got them."""

    NOBODY = 0
    GIVER = _MOST
    OTHER = _MOST - 1


def make() -> int:
    """A new token, which nobody has claimed. The caller closes it. Raises OSError."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def claim(token: int, claimant: Claimant = Claimant.OTHER) -> bool:
    """Whether the sessions are the caller's from now on; another has claimed them if not.

    Also False for a descriptor that is no token: who sent it does not keep to the agreement.
    """
    try:
        if stat.S_IFMT(os.fstat(token).st_mode):  # a file, a socket, a pipe
            return False
        os.set_blocking(token, False)
        os.eventfd_write(token, claimant)
    except OSError:
        return False
    return True


def give_up(token: int) -> Claimant:
    """Who had claimed; if that was not the giver, others can claim now.

    For one that has not taken the sessions, or has died before it answered TAKEN. Raises OSError.
    """
    os.set_blocking(token, False)  # who has sent it might have sent something else
    try:
        found = os.eventfd_read(token)
    except BlockingIOError:
        return Claimant.NOBODY
    if found != Claimant.GIVER:
        return Claimant.OTHER
    claim(token, Claimant.GIVER)  # its sessions stay claimed
    return Claimant.GIVER
