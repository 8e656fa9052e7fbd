"""Do to a forwarder what can happen to it, and look whether anybody lost anything by it."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from chaos import acts
from chaos.acts import Deed
from chaos.run import run

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPACES: Final = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# Process 1 of the namespace: a shell reaps what others have left to it.
_REAPER: Final = ("sh", "-c", '"$@"; exit $?', "sh")


def main(argv: Sequence[str]) -> int:
    """The status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, metavar="N", help="of the acts; else by chance")
    parser.add_argument("--minutes", type=float, default=1, metavar="M", help="how long")
    parser.add_argument("--only", action="append", metavar="WORD", help="acts that have this word")
    parser.add_argument("--without", action="append", metavar="WORD", help="all but those")
    parser.add_argument("--list", type=int, metavar="N", help="show the first N acts, and do none")
    parser.add_argument("--keep", default="", metavar="DIR", help="copy all logs there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = random.randrange(1 << 16)
        argv = [*argv, "--seed", str(args.seed)]
    only, without = args.only or [""], args.without or []
    deeds = frozenset(
        deed
        for deed in Deed
        if any(word in deed.value for word in only)
        and not any(word in deed.value for word in without)
    )
    if args.list:
        for number, act in enumerate(itertools.islice(acts.plan(args.seed, deeds), args.list)):
            print(f"{number}. after {act.pause_s:.2f} s {act}")  # noqa: T201 - asked for
        return 0
    if not args.inside:
        if os.geteuid() != 0:
            parser.error("only root can make the namespaces that it runs in")
        inner = [sys.executable, "-m", "chaos", *argv, "--inside"]
        return subprocess.run(["unshare", *_SPACES, *_REAPER, *inner], check=False).returncode
    report = run(args.seed, 60 * args.minutes, deeds, args.keep)
    print(report.text(), flush=True)  # noqa: T201 - what it is for
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
