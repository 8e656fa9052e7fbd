"""Places in the code of a forwarder where one of its processes kills itself, or fails, once.

By a ``sitecustomize`` module, so that it is in all processes that start from then on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

_CODE = """
import functools, os, signal
from importlib import import_module

def make_fatal(module, names, when):
    *path, name = names.split(".")
    owner = functools.reduce(getattr, path, import_module(module))
    method = getattr(owner, name)

    def fatal(*args, **kwargs):
        if when == "before":
            die()
        result = method(*args, **kwargs)
        die()
        return result

    setattr(owner, name, fatal)

def die():
    try:
        os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if {fails!r}:
        raise RuntimeError("a bug")
    os.kill(os.getpid(), signal.SIGKILL)

make_fatal({module!r}, {names!r}, {when!r})
"""


class Fatal:
    """Makes calls of a function fatal for the first process that comes to it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._mark = directory / "killed"
        directory.mkdir()
        monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)

    def set(self, when: str, module: str, names: str, *, fails: bool = False) -> None:
        """``when`` is before or after the call of ``module.names``; ``fails``: it raises.

        For processes that start from now on and are not forked from one that runs already.
        """
        code = _CODE.format(
            mark=str(self._mark), module=module, names=names, when=when, fails=fails
        )
        (self._directory / "sitecustomize.py").write_text(code)

    def unset(self) -> None:
        """Not for processes that start from now on."""
        (self._directory / "sitecustomize.py").unlink()

    @property
    def has_happened(self) -> bool:
        """Whether one was killed."""
        return self._mark.exists()
