"""Runs the cases in ``valid`` and ``invalid``; a case is a configuration and what must come of it.

``valid/X`` goes with ``valid/X.json``: the fields that differ from their defaults, the warnings
and, if there is any, the advice. ``invalid/X`` goes with ``invalid/X.txt``: one problem per line.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path

import pytest

from forwarder.config import Dialect, load
from forwarder.config.address import Address, UnixAddress
from forwarder.config.advice import advise
from forwarder.config.check_values import show_bytes
from forwarder.config.model import Upstream
from forwarder.errors import ConfigError, Issue, Place

HERE = Path(__file__).parent
VALID = sorted(path for path in (HERE / "valid").iterdir() if path.suffix in {".conf", ".toml"})
INVALID = sorted(path for path in (HERE / "invalid").iterdir() if path.suffix in {".conf", ".toml"})


def plain(value: object) -> object:
    """Turn a part of the model into what JSON can say."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Address | UnixAddress):
        return str(value)
    if isinstance(value, Upstream) and value == Upstream(value.end):
        return str(value)
    if isinstance(value, bytes):
        return show_bytes(value)
    if isinstance(value, Place):
        return f"{value.line}:{value.column}"
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        }
    return value


def lines_of(issues: tuple[Issue, ...], path: Path) -> list[str]:
    return [str(issue).replace(f"{path.parent}/", "") for issue in issues]


def outcome_of_valid(path: Path) -> object:
    loaded = load(path)
    found = {"config": plain(loaded.config), "warnings": lines_of(loaded.warnings, path)}
    advice = lines_of(advise(loaded.config, Dialect.of(path)), path)
    return found | ({"advice": advice} if advice else {})


def outcome_of_invalid(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return lines_of(caught.value.issues, path)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.name)
def test_valid_file_becomes_the_expected_model(path: Path) -> None:
    expected = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert outcome_of_valid(path) == expected


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_invalid_file_is_refused_with_every_problem(path: Path) -> None:
    expected = path.with_name(f"{path.name}.txt").read_text().splitlines()
    assert outcome_of_invalid(path) == expected


def test_every_expectation_belongs_to_a_case() -> None:
    expected = {*HERE.glob("valid/*.json"), *HERE.glob("invalid/*.txt")}
    cases = {path.with_name(f"{path.name}.json") for path in VALID}
    cases |= {path.with_name(f"{path.name}.txt") for path in INVALID}
    assert expected == cases
    assert VALID
    assert INVALID
