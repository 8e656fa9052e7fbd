"""Measure many UDP clients at once: a flood of new ones, and thousands that go on.

Run from the project root as ``python -m bench.udp_flows``. The same as ``python -m bench`` with
these measures and the peers that forward UDP; takes its options, too.
"""

from __future__ import annotations

import sys

from bench.__main__ import main
from bench.measures import FLOWS

if __name__ == "__main__":
    only = ",".join(measure.name for measure in FLOWS)
    own = ["--only", only, "--peers", "forwarder,forwarder-copy,nginx", "--seconds", "3"]
    sys.exit(main([*own, *sys.argv[1:]]))
