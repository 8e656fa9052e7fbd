"""Looking a name up, and telling what came of it. Blocks as long as the name servers take."""

from __future__ import annotations

import socket
from typing import Final

from forwarder.upstream.answers import Answer, targets_of

# The name means nothing, or has no address; all other errors may be over the next time.
_FINAL: Final = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


def look_up(host: str, now: float) -> Answer:
    """Ask the system for the addresses of ``host``; ``now`` is when the answer counts from."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as err:  # a name that IDNA cannot encode
        return Answer((), str(err), is_final=True, since=now)
    except OSError as err:
        why = err.strerror or str(err)
        return Answer((), why, is_final=err.errno in _FINAL, since=now)
    return Answer(targets_of((family, at) for family, _, _, _, at in found), since=now)
