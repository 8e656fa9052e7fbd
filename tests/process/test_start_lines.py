"""What a start and a reload say of each rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.ends import listen
from support.forwarder import reserve_port
from support.processes import run_command

from forwarder.config import Dialect, parse
from forwarder.config.describe import listening

if TYPE_CHECKING:
    from pathlib import Path

    from process.conftest import Launch

RULE = '[[forwarding_rules]]\nname = "{}"\nlisten = "{}"\nupstream = {}\n'


@pytest.mark.process
def test_a_start_says_where_each_rule_listens_and_a_reload_what_waits(
    launch: Launch, tmp_path: Path
) -> None:
    path, control = tmp_path / "a.toml", tmp_path / "c.sock"
    with reserve_port() as free, listen() as taken:
        here, there = ("{}:{}".format(*sock.getsockname()) for sock in (free, taken))
        text = RULE.format("web", here, '"10.0.0.1:80"')
        late = RULE.format("late", there, '"10.0.0.1:81"') + 'bind = "retry"\n'
        path.write_text(text + late)
        forwarder = launch("-c", str(path), "--workers", "1", "--control", str(control))
        said = "\n".join(forwarder.lines)
        assert f" listening web tcp {here} -> 10.0.0.1:80" in said
        assert f" waiting late tcp {there} -> 10.0.0.1:81" in said
        done = run_command("reload", "--control", str(control))
        assert done.stdout.endswith("generation 2; waiting for an address: late\n")
        path.write_text(text)
        done = run_command("reload", "--control", str(control))
        assert done.stdout.endswith("generation 3\n")


def test_twenty_rules_have_a_line_each_and_the_others_are_counted() -> None:
    text = "".join(RULE.format(f"r{n}", f":{n + 1}", '"a:1"') for n in range(25))
    rules = parse(text, "a.toml", Dialect.TOML).config.rules
    lines = listening(rules, lambda rule: "waiting" if rule.name == "r1" else "listening")
    assert len(lines) == 21
    assert lines[:2] == ["listening r0 tcp [::]:1 -> a:1", "waiting r1 tcp [::]:2 -> a:1"]
    assert lines[20] == "listening and 5 more rules"
    assert len(listening(rules[:20], lambda _: "listening")) == 20
    assert listening(rules[:21], lambda _: "listening")[20] == "listening and 1 more rule"


def test_a_rule_without_a_name_is_not_called_by_its_address_twice() -> None:
    text = '[[forwarding_rules]]\nlisten = ":1"\nupstream = ["a:1", "a:2", "a:3", "a:4", "a:5"]\n'
    (line,) = listening(parse(text, "a.toml", Dialect.TOML).config.rules, lambda _: "listening")
    assert line == "listening tcp [::]:1 -> a:1, a:2, a:3 and 2 more"
