#!/usr/bin/env python3
"""Ask the forwarder beside us to reload whenever its configuration file has changed.

    reload-on-change FILE

For a container beside the forwarder's that shares its runtime directory. Looks at the contents
every two seconds: kubelet changes a ConfigMap by moving a link above the file, which inotify(7) on
the file does not report. Prints what `forwarder reload` prints. Ends by SIGTERM or SIGINT.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

EVERY_S: Final = 2.0  # kubelet itself takes a minute to bring a change; arbitrary
_UNAVAILABLE: Final = 69  # no forwarder runs yet, or any more


def main() -> None:
    """Watch until a signal."""
    # Process 1 of a container ignores signals without a handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    path = Path(sys.argv[1])
    known: bytes | None = None  # the contents may have changed before the start: that counts
    while True:
        try:
            contents = path.read_bytes()
        except OSError as err:
            sys.stderr.write(f"{path}: {err.strerror}\n")
        else:
            if contents != known:
                ended = subprocess.run(["forwarder", "reload"], check=False)
                # A rejected configuration is tried again when the file has changed.
                known = None if ended.returncode == _UNAVAILABLE else contents
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
