"""Runs the cases in ``convert``; a case is a foreign configuration and what becomes of it.

``convert/X`` goes with ``convert/X.toml.out``, our format, and ``convert/X.report``, a difference
or problem per line; without the first it cannot be converted.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from forwarder.cli.convert import find_files
from forwarder.config import Dialect, parse
from forwarder.errors import ConfigError
from forwarder.migrate import Outside, convert, guess

HERE = Path(__file__).parent / "convert"
CASES = sorted(path for path in HERE.iterdir() if path.suffix in {".conf", ".toml", ".yaml"})
OUTSIDE = Outside(service_port=socket.getservbyname, find=find_files)


def outcome(path: Path) -> tuple[str | None, str]:
    """The result, or None, and the report."""
    text = path.read_text()
    try:
        converted = convert(text, str(path), guess(path, text), OUTSIDE)
    except ConfigError as error:
        result, report = None, error.issues
    else:
        result, report = converted.text, converted.report
    return result, "".join(f"{issue}\n".replace(f"{HERE}/", "") for issue in report)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_a_foreign_configuration_becomes_ours_with_a_report(path: Path) -> None:
    result, report = outcome(path)
    expected = HERE / f"{path.name}.toml.out"
    assert result == (expected.read_text() if expected.exists() else None)
    assert report == (HERE / f"{path.name}.report").read_text()
    if result is not None:
        parse(result, path.name, Dialect.TOML)


def test_every_expectation_belongs_to_a_case() -> None:
    expected = {path.name for path in HERE.iterdir() if path.suffix in {".out", ".report"}}
    reports = {f"{path.name}.report" for path in CASES}
    assert reports <= expected
    assert {name.removesuffix(".toml.out") for name in expected - reports} <= {
        path.name for path in CASES
    }
