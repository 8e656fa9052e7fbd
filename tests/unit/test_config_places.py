"""The locator of TOML keys: behind and inside whatever may confuse it."""

from __future__ import annotations

import tomllib

import pytest

from forwarder.config.toml_places import Places


@pytest.mark.parametrize(
    "value",
    [
        '"x # ] }"',
        '"\\\\\\""',
        "'\\'",
        '""',
        "''",
        '"""a "" b\n[t]\nz = 1\n"""',
        '"""quotes at the end"""""',
        '"""\\""" [t]"""',
        "'''a '' b\n[t]\nz = 1\n'''",
        "'''quotes at the end'''''",
        "[ # [\n 'a', [1, 2,],\n]",
        "{ a = { b = ']' }, 'c' = [{}] }",
        "1979-05-27 07:32:00",
        "-1_000.5e3",
    ],
)
def test_what_follows_a_value_is_found(value: str) -> None:
    text = f"[[t]]\na = {value} # z = 1\nz = 2\n"
    assert tomllib.loads(text)["t"][0]["z"] == 2
    place = Places(text, "file").at(("t", 0, "z"))
    assert (place.line, place.column) == (text.count("\n"), 1)


def test_places_inside_tables_of_every_kind() -> None:
    text = (
        "top = 1\n"
        "[[t]]\n"
        "  b.c = 1\n"
        "[[t]]\n"
        "x = [{ y = 1 }, { 'y' = [2] }]\n"
        "[[t.sub]]\n"
        "[t.sub.deep]\n"
        "k = 1\n"
    )
    tomllib.loads(text)
    places = Places(text, "file")
    expected = {
        ("top",): (1, 1),
        ("t",): (2, 1),
        ("t", 0): (2, 1),
        ("t", 0, "b", "c"): (3, 3),
        ("t", 1): (4, 1),
        ("t", 1, "x", 1, "y"): (5, 19),
        ("t", 1, "x", 1, "y", 0): (5, 26),
        ("t", 1, "sub", 0, "deep", "k"): (8, 1),
        ("t", 1, "unknown"): (4, 1),
        ("none",): (0, 0),
    }
    found = {path: places.at(path) for path in expected}
    assert {path: (place.line, place.column) for path, place in found.items()} == expected
