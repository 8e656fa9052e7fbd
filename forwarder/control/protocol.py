"""What both ends of the control socket have to agree on."""

from __future__ import annotations

from typing import Final

# All three arbitrary; a request of ours has 20 bytes, a rule in an answer 400 to 1,000, and there
# may be 10,000 of them.
MAX_LINE_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
# Sessions in one answer, whatever a client asks for.
MAX_LISTED: Final = 10_000
MAX_LOGIN: Final = 64  # characters; useradd(8) allows 32

# How the refusal of a configuration begins; its problems follow.
REJECTED: Final = "the configuration was rejected"
