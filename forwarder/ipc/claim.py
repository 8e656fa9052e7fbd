"""Who goes on with sessions that are on their way: who claims them first, whatever is killed.

Each consignment brings a token, an eventfd(2) that holds 1. Reading takes the 1 away, in the
kernel, so of all who have the token one gets it: the taker before it answers TAKEN, or the giver
when nobody is left to say what became of the consignment. Knows no sessions. Never blocks.
"""

from __future__ import annotations

import os


def make() -> int:
    """A new token, which nobody has claimed. The caller closes it. Raises OSError."""
    return os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def claim(token: int) -> bool:
    """Whether the sessions are the caller's from now on; another has claimed them if not.

    Also False for a descriptor that is no token: who sent it does not keep to the agreement.
    """
    try:
        os.set_blocking(token, False)
        return len(os.read(token, 8)) == 8
    except OSError:
        return False


def give_up(token: int) -> None:
    """Let others claim again: who had is dead, and has not answered TAKEN. Raises OSError."""
    os.set_blocking(token, False)  # who has sent it might have sent something else
    os.eventfd_write(token, 1)
