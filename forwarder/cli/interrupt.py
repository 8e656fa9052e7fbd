"""Ctrl-C before and after the service: the command ends, without a traceback.

Imported before anything else, since the imports of the others take a quarter of a second: so it
imports only what the interpreter has loaded at its start.
"""

from __future__ import annotations

import os
import signal


def end(*_: object) -> None:
    """End this process as SIGINT does; a shell that runs a script then knows that it is over."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # process 1 of a container is spared unhandled signals


def be_silent() -> None:
    """From now on SIGINT ends the process at once, unless its parent had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def be_raised() -> None:
    """From now on SIGINT raises KeyboardInterrupt: there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
