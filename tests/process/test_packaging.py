"""Wheel and source distribution: built, installed into an empty environment, and run from there."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.waiting import PATIENCE_S

from forwarder import DISTRIBUTION, __version__

if TYPE_CHECKING:
    from email.message import Message

pytestmark = pytest.mark.process

ROOT: Final = Path(__file__).parents[2]
SDIST: Final = f"{DISTRIBUTION.replace('-', '_')}-{__version__}"
WHEEL: Final = f"{SDIST}-py3-none-any.whl"
DATA: Final = f"{SDIST}.data/data/share"
INFO: Final = f"{SDIST}.dist-info"


def run(
    *command: str | Path, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; it must end well."""
    ran = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        check=False,
    )
    assert ran.returncode == 0, ran
    return ran


def build(source: Path, target: Path, *kinds: str) -> None:
    """Build distributions with the tools of this environment; no network."""
    chosen = [word for kind in kinds for word in ("-t", kind)]
    run(sys.executable, "-m", "hatchling", "build", "-d", target, *chosen, cwd=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel, the source distribution, and that one unpacked."""
    target = tmp_path_factory.mktemp("built")
    build(ROOT, target, "wheel", "sdist")
    # Not by tarfile, whose filters came with 3.11.4 and are asked for by later versions.
    run("tar", "-xzf", f"{SDIST}.tar.gz", cwd=target)
    return target


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel. What it depends on comes from this environment."""
    path = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", path)
    pip = (sys.executable, "-m", "pip", "--python", path / "bin" / "python", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", built / WHEEL)
    return path


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{INFO}/METADATA"))


def test_the_wheel_has_the_package_and_what_belongs_to_it(built: Path) -> None:
    names = names_in(built / WHEEL)
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "forwarder").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert package <= names
    shared = (
        *("man/man8/forwarder.8", "man/man5/forwarder.toml.5"),
        *(f"doc/forwarder/examples/{name}" for name in ("forwarder.toml", "rinetd.conf")),
    )
    assert {f"{DATA}/{name}" for name in shared} <= names
    assert f"{INFO}/licenses/LICENSE" in names
    others = {name for name in names - package if not name.startswith((INFO, DATA))}
    assert not others


def test_the_wheel_says_what_it_is(built: Path) -> None:
    found = metadata(built / WHEEL)
    assert (found["Name"], found["Version"]) == (DISTRIBUTION, __version__)
    assert (found["License-Expression"], found["Requires-Python"]) == ("MIT", ">=3.11")
    assert {"bench", "convert", "deploy", "dev", "dns"} == set(
        found.get_all("Provides-Extra") or []
    )
    assert "Operating System :: POSIX :: Linux" in (found.get_all("Classifier") or [])


def test_the_source_distribution_makes_the_same_wheel(built: Path, tmp_path: Path) -> None:
    build(built / SDIST, tmp_path, "wheel")
    assert names_in(tmp_path / WHEEL) == names_in(built / WHEEL)
    assert metadata(tmp_path / WHEEL).items() == metadata(built / WHEEL).items()


def test_the_source_distribution_has_tests_documents_and_examples(built: Path) -> None:
    for name in ("tests", "docs", "deploy", "bench", "Makefile", "LICENSE", "pyproject.toml"):
        assert (built / SDIST / name).exists(), name


def test_the_installed_command_runs_and_its_pages_are_there(environment: Path) -> None:
    """`pipx run` wants the name of the command, which is not that of the distribution."""
    site = sysconfig.get_path("purelib")
    command = environment / "bin" / "forwarder"
    shown = run(command, "--version", PYTHONPATH=site)
    assert shown.stdout.startswith(f"forwarder {__version__} (distribution {DISTRIBUTION})\n")
    run(command, "check", "-l", "127.0.0.1:1", "-r", "127.0.0.1:2", PYTHONPATH=site)
    where = "import forwarder; print(forwarder.__file__)"
    # Not from the directory of the tests: -P.
    loaded = run(environment / "bin" / "python", "-P", "-c", where, PYTHONPATH=site).stdout
    assert loaded.startswith(str(environment))
    for page in ("man8/forwarder.8", "man5/forwarder.toml.5"):
        assert (environment / "share" / "man" / page).is_file()
