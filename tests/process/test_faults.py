"""Calls of the kernel that fail under load: what that costs, and that all is well afterwards.

The most telling of those that ``make faults`` tries; docs/faults.md has all.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from faults.cases import ALWAYS, OFTEN, Case, Doing
from faults.traffic import CUT
from faults.trying import try_case
from support.programs import debian

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may trace others"),
]

# Lack of memory passes: nobody is cut. Nor by what the worker can do without.
PAUSES = [
    Case("splice", "ENOMEM", OFTEN),
    Case("sendto", "ENOBUFS", OFTEN),
    Case("connect", "ENOBUFS", OFTEN),
    Case("accept4", "EMFILE", ALWAYS),
    Case("recvmmsg", "ENOMEM", OFTEN),
    Case("write", "ENOSPC", OFTEN),
]
# A few conversations are cut, which is seen at both ends, or a worker is started later.
COSTS = [
    Case("recvfrom", "EIO", OFTEN),
    Case("epoll_ctl", "ENOSPC", OFTEN),
    Case("recvmsg", "ENOMEM", ALWAYS, is_worker=False, doing=Doing.DEATH),
    Case("epoll_ctl", "ENOSPC", "1", is_worker=False, doing=Doing.DEATH),
    Case("epoll_ctl", "ENOSPC", "1", is_worker=False, doing=Doing.RELOAD),
    Case("epoll_ctl", "ENOSPC", "1", is_worker=False, doing=Doing.STATUS),
    Case("getsockopt", "ENOBUFS", ALWAYS, is_worker=False, doing=Doing.STATUS),
]


@debian("strace")
@pytest.mark.parametrize("case", PAUSES, ids=lambda case: case.name)
def test_what_passes_costs_a_pause(case: Case) -> None:
    outcome = asyncio.run(try_case(case))
    assert outcome.injected
    assert not outcome.problems
    assert not outcome.during.total(CUT), outcome.during.text()


@debian("strace")
@pytest.mark.parametrize("case", COSTS, ids=lambda case: case.name)
def test_what_does_not_pass_costs_what_it_happens_to(case: Case) -> None:
    """Whoever is cut sees that, nothing leaks, nobody dies, and then all is well."""
    outcome = asyncio.run(try_case(case))
    assert outcome.injected
    assert not outcome.problems
