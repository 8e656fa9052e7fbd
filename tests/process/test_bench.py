"""The measurements really run, for as short as they can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.namespaces import needs_network, network
from support.pages import ROOT
from support.programs import debian

from bench.variants import VARIANTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process

FORWARDER = f"{sys.executable} -m forwarder"
# A perf that has recorded one sample and counted what a virtual machine can, and ends on SIGINT.
FAKE_PERF = """\
#!/bin/sh
wait_for_the_end() {
    trap 'exit 0' INT
    while :; do sleep 0.05; done
}
case $1 in
stat)
    for last; do :; done
    [ "$last" != true ] || exit 0
    while [ "$1" != -o ]; do shift; done
    for event in context-switches raw_syscalls:sys_enter; do
        echo "700,,$event,1,100.00,," >>"$2"
    done
    echo '<not supported>,,cycles,0,100.00,,' >>"$2"
    wait_for_the_end
    ;;
record) wait_for_the_end ;;
script) printf 'forwarder\\n\\t1 tcp_sendmsg_locked ([kernel.kallsyms])\\n\\n' ;;
esac
"""
FAKE_STRACE = """\
#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo ' 99.00    0.500000          28     17484       283 splice' >"$2"
trap 'exit 0' INT
while :; do sleep 0.05; done
"""
FAKE_FLAMEGRAPH = """\
#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo '<svg xmlns="http://www.w3.org/2000/svg"></svg>' >"$2"
"""
FAKE_SPY = """\
#!/bin/sh
echo 'Error: Permission Denied' >&2
exit 1
"""


def bench(tool: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a measurement, with programs in ``path`` before all others."""
    env = dict(os.environ)
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", tool, "--forwarder", FORWARDER, "--seconds", "1", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def install(directory: Path, **programs: str) -> Path:
    """Write programs, by name with _ for -."""
    for name, text in programs.items():
        program = directory / name.replace("_", "-")
        program.write_text(text)
        program.chmod(0o755)
    return directory


@debian("iperf3")
@needs_network
def test_a_round_of_a_second_gives_figures_of_both_peers_and_a_report(tmp_path: Path) -> None:
    """Report, JSON and pictures are written; nobody listens afterwards, for bench looks itself."""
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    words = ("--only", "bulk1", "--peers", "direct,forwarder", "--rounds", "1")
    files = ("--json", str(tmp_path / "run.json"), "--out", str(tmp_path / "out"))
    with network():
        done = bench("bench", *words, *files)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    (section,) = run["sections"]
    by_peer = section["results"]["rounds"]["bulk1"]
    assert by_peer["direct"]["0"]["gbit_s"] > 0
    assert by_peer["forwarder"]["0"]["gbit_s"] > 0
    assert by_peer["forwarder"]["0"]["cpu"] > 0
    assert run["failures"] == []
    assert run["peers"]["forwarder"][0].startswith("forwarder ")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("measured.svg", "report.html", "report.md", "results.json"),
    }
    assert "<svg" in (out / "measured.svg").read_text()
    assert "| forwarder | " in (out / "report.md").read_text()
    assert (out / "results.json").read_text() == (tmp_path / "run.json").read_text()


@debian("iperf3")
@needs_network
def test_a_peer_that_does_not_start_is_in_the_report_and_the_others_go_on(tmp_path: Path) -> None:
    programs = install(tmp_path, rinetd="#!/bin/sh\necho 'no mood' >&2\nexit 3\n")
    words = ("--only", "bulk1", "--peers", "rinetd,direct", "--rounds", "1")
    with network():
        done = bench("bench", *words, path=programs)
    assert done.returncode == 1
    assert "- went wrong: bulk1 rinetd: rinetd ended by itself, exit status 3" in done.stdout
    assert "no mood" in done.stdout
    assert "| direct | " in done.stdout


@debian("iperf3")
@needs_network
def test_system_calls_are_counted_by_perf_and_are_left_out_where_it_may_not(
    tmp_path: Path,
) -> None:
    """The perf says that there were 700 of them, then it is one that is not permitted."""
    words = ("--only", "bulk1", "--peers", "forwarder", "--rounds", "1", "--calls")
    with network():
        done = bench("bench", *words, path=install(tmp_path, perf=FAKE_PERF))
        assert done.returncode == 0, done.stderr
        assert "system calls/MB" in done.stdout
        done = bench("bench", *words, path=install(tmp_path, perf="#!/bin/sh\nexit 255\n"))
    assert done.returncode == 0, done.stderr
    assert "system calls/MB" not in done.stdout
    assert "- system calls: not counted" in done.stdout


@debian("iperf3")
@needs_network
def test_a_port_that_is_taken_ends_the_run(tmp_path: Path) -> None:
    with network():
        code = "import socket; s = socket.create_server(('127.0.0.1', 9000)); print(); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            words = ("--only", "bulk1", "--peers", "direct", "--json", str(tmp_path / "run.json"))
            done = bench("bench", *words)
    assert done.returncode == 1
    assert "port 9000 is taken" in done.stderr
    assert not (tmp_path / "run.json").exists()


@debian("ip", "nft", "dnsmasq", "ab")
@needs_network
def test_sessions_by_least_are_even_and_no_server_has_too_many() -> None:
    """What the documentation says of 4 workers and of 8, measured as it was measured there."""
    done = bench("bench.groups", "--only", "least,limit", "--programs", "forwarder")
    assert done.returncode == 0, done.stderr
    assert "| forwarder | 300 | 100, 100, 100 | 0 |" in done.stdout
    found = [line for line in done.stdout.splitlines() if "| 10,000 |" in line]
    assert len(found) == 2, "one with a queue, and one without"
    for row in found:
        assert row.endswith("| 5, 5, 5 | 0 |"), row


@debian("iperf3")
@needs_network
def test_a_profile_says_what_it_saw_and_goes_on_without_a_tool_that_fails(tmp_path: Path) -> None:
    """perf and strace have seen something, py-spy may not look; flamegraph has drawn."""
    programs = install(
        tmp_path,
        perf=FAKE_PERF,
        strace=FAKE_STRACE,
        flamegraph=FAKE_FLAMEGRAPH,
        py_spy=FAKE_SPY,
    )
    out = tmp_path / "out"
    with network():
        done = bench("bench.profile", "--only", "bulk1", "--out", str(out), path=programs)
    assert done.returncode == 0, done.stderr
    text = (out / "profile.md").read_text()
    assert "100% of its samples are in the kernel" in text
    assert "Permission Denied" in text
    assert "| cycles | not supported |  |" in text
    assert "| context-switches | 700 | " in text
    assert "| splice | 17,484 | 283 | 99.0 |" in text
    assert "forwarder: work" in text
    assert (out / "forwarder-bulk1.folded").read_text() == "forwarder;tcp_sendmsg_locked 1\n"
    assert (out / "forwarder-bulk1-perf.svg").read_text() == FAKE_FLAMEGRAPH.split("'")[1] + "\n"
    assert "<object " in (out / "profile.html").read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_forwarder_starts_in_every_variant(name: str) -> None:
    """The patch finds what it changes, and the command is itself afterwards."""
    command = [sys.executable, "-m", "bench.variants", "--run", name, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("forwarder ")


@needs_network
@debian("gcc")
def test_a_variant_is_measured_against_the_program_as_it_is() -> None:
    command = [sys.executable, "-m", "bench.variants", "--variants", "gc-off", "--only", "rr"]
    with network():
        done = subprocess.run(
            [*command, "--rounds", "1", "--seconds", "1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "| gc-off | no garbage collector |" in done.stdout
