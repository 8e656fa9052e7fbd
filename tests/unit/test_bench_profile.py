"""Profiles: read, folded, counted, and judged."""

from __future__ import annotations

import re

import pytest

from bench import profile_page
from bench.counters import HARDWARE, Call, parse_stat, parse_strace
from bench.judgement import SWITCHES, Seen, judge
from bench.measures import BY_NAME
from bench.profile_page import Profile
from bench.stacks import (
    COPYING,
    INTERPRETER,
    KERNEL,
    KINDS,
    LOOPBACK,
    OTHER,
    WAKING,
    Frame,
    folded,
    hottest,
    kind,
    parse_script,
    shares,
)

SCRIPT = """\
forwarder: work\x20
\tffffffff81b6ccb0 _copy_to_iter ([kernel.kallsyms])
\tffffffff81e31688 __sys_recvfrom ([kernel.kallsyms])
\t          10a929 __libc_recv (/usr/lib/libc.so.6)
\t7878787878787878 [unknown] ([unknown])

forwarder: work\x20
\t          2ba754 visit_decref (/usr/lib/libpython3.11.so.1.0)

forwarder: work\x20
\t          2ba754 visit_decref (/usr/lib/libpython3.11.so.1.0)

iperf3\x20
\t    7f77a8448640 std::a<b;c> (int) (/opt/a b/tool)

"""
STAT = """\
# started on Tue Nov 24 19:05:54 2026

<not supported>,,cycles,0,100.00,,
1234,,instructions:u,1000,100.00,,
29,,context-switches,1000,100.00,42.059,K/sec
0.69,msec,task-clock,690000,100.00,0.474,CPUs utilized
17,,raw_syscalls:sys_enter,1000,100.00,,
<not counted>,,branches,0,100.00,,
"""
STRACE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 99.00    0.500000          28     17484       283 splice
  1.00    0.005000           5      1086           epoll_wait
------ ----------- ----------- --------- --------- ----------------
100.00    0.505000          27     18570       283 total
"""


def stack(*names: str, file: str = "[kernel.kallsyms]") -> tuple[Frame, ...]:
    return tuple(Frame(name, file) for name in names)


def kinds(**given: float) -> dict[str, float]:
    """Shares by short names; what is left is other code of the program."""
    names = {"copying": COPYING, "waking": WAKING, "loopback": LOOPBACK, "kernel": KERNEL}
    names["interpreter"] = INTERPRETER
    found = {**dict.fromkeys(KINDS, 0.0), **{names[key]: share for key, share in given.items()}}
    found[OTHER] = 1 - sum(given.values())
    return found


def answers(seen: Seen) -> dict[str, bool]:
    return {finding.name: finding.holds for finding in judge(seen)}


def seen(
    *,
    switches: float | None = 0.0,
    threads: tuple[float, ...] = (0.5, 0.5),
    machine: float = 0.7,
    unit: str = "MB",
    **given: float,
) -> Seen:
    named = [(f"worker {number}", share) for number, share in enumerate(threads)]
    shares_of = kinds(**given) if given else {}
    return Seen(unit=unit, switches=switches, threads=named, machine=machine, kinds=shares_of)


def test_equal_stacks_are_counted_together_with_the_outermost_function_first() -> None:
    assert folded(parse_script(SCRIPT)) == (
        "forwarder: work;[unknown];__libc_recv;__sys_recvfrom;_copy_to_iter 1\n"
        "forwarder: work;visit_decref 2\n"
        "iperf3;std::a<b:c> (int) 1\n"
    )


def test_a_profile_without_samples_is_empty() -> None:
    assert not parse_script("")
    assert shares(parse_script("")) == {}


def test_a_sample_is_told_by_the_first_kind_of_which_a_function_is_on_its_stack() -> None:
    assert kind(stack("rep_movs_alternative", "_copy_to_iter", "net_rx_action")) == COPYING
    assert kind(stack("__schedule", "schedule", "ep_poll", "do_epoll_wait")) == WAKING
    assert kind(stack("tcp_ack", "process_backlog", "__napi_poll")) == LOOPBACK
    assert kind(stack("tcp_sendmsg_locked", "do_syscall_64")) == KERNEL
    assert kind(stack("nft_do_chain", file="[nf_tables]")) == KERNEL
    assert kind(stack("_PyEval_EvalFrameDefault", file="/usr/bin/python3.11")) == INTERPRETER
    assert kind(stack("memcpy", file="/usr/lib/libc.so.6")) == OTHER
    assert kind(stack("clock_gettime", file="[vdso]")) == OTHER


def test_shares_are_of_all_samples_and_the_hottest_function_comes_first() -> None:
    samples = parse_script(SCRIPT)
    found = shares(samples)
    assert (found[COPYING], found[INTERPRETER], found[OTHER]) == (0.25, 0.5, 0.25)
    assert hottest(samples, 1) == [("visit_decref", 0.5)]


def test_events_that_the_machine_does_not_have_are_none() -> None:
    assert parse_stat(STAT) == {
        "cycles": None,
        "instructions": 1234.0,
        "context-switches": 29.0,
        "task-clock": 0.69,
        "raw_syscalls:sys_enter": 17.0,
        "branches": None,
    }


def test_system_calls_are_read_with_their_errors_and_without_the_sum() -> None:
    assert parse_strace(STRACE) == [
        Call("splice", 17484, 283, 99.0),
        Call("epoll_wait", 1086, 0, 1.0),
    ]


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        ({"kernel": 0.59}, False),
        ({"kernel": 0.61}, True),
        ({"kernel": 0.3, "loopback": 0.2, "waking": 0.11}, True),
        ({"copying": 0.24}, False),
        ({"copying": 0.26}, True),
    ],
)
def test_system_calls_and_copies_are_told_by_their_share(
    given: dict[str, float], *, holds: bool
) -> None:
    assert answers(seen(**given))["syscall or copy bound"] is holds  # type: ignore[arg-type]


def test_wake_ups_are_told_by_switches_for_each_unit_or_by_their_share() -> None:
    for unit, limit in SWITCHES.items():
        assert answers(seen(unit=unit, switches=limit))["wake-up bound"] is True
        assert answers(seen(unit=unit, switches=0.9 * limit))["wake-up bound"] is False
    assert answers(seen(switches=0.0, waking=0.21))["wake-up bound"] is True
    assert answers(seen(switches=0.0, waking=0.19))["wake-up bound"] is False


def test_a_single_thread_limits_when_it_is_busy_and_the_others_are_not() -> None:
    assert answers(seen(threads=(0.1, 0.95)))["single-thread limited"] is True
    assert answers(seen(threads=(0.95,)))["single-thread limited"] is True
    assert answers(seen(threads=(0.95, 0.6)))["single-thread limited"] is False
    assert answers(seen(threads=(0.89, 0.0)))["single-thread limited"] is False


def test_a_machine_without_a_cpu_to_spare_is_told() -> None:
    (finding,) = [it for it in judge(seen(machine=0.97)) if it.name == "single-thread limited"]
    assert "no thread could have had more" in finding.sentence
    (finding,) = [it for it in judge(seen(machine=0.6)) if it.name == "single-thread limited"]
    assert "no thread could have had more" not in finding.sentence


def test_without_samples_only_what_was_counted_is_judged() -> None:
    assert [*answers(seen())] == ["wake-up bound", "single-thread limited"]
    assert [*answers(seen(switches=None))] == ["single-thread limited"]
    assert [*answers(seen(interpreter=0.5))].count("interpreter bound") == 1


def test_every_sentence_tells_its_threshold() -> None:
    for finding in judge(seen(kernel=0.9)):
        assert "from" in finding.sentence, finding.name


def test_every_load_that_can_be_profiled_has_a_threshold() -> None:
    units = {measure.unit.name for measure in BY_NAME.values() if measure.unit}
    assert units == {*SWITCHES}


def profile() -> Profile:
    return Profile(
        name="bulk1",
        title="bulk <1>",
        peer="forwarder",
        seconds=1,
        unit="MB",
        units=10.0,
        seen=seen(),
        counted={**dict.fromkeys(HARDWARE), "context-switches": 29.0},
        samples=4,
        kinds=kinds(kernel=0.8),
        hottest=[("tcp_ack", 0.1)],
        calls=parse_strace(STRACE),
        graphs={"perf": '<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>'},
        notes=["there is no py-spy here (the extra bench)"],
    )


def test_the_page_of_profiles_names_no_other_file() -> None:
    text = profile_page.html(["Linux <6>"], [profile()])
    for place in re.findall(r'(?:src|href|data)="([^"]*)"', text):
        assert place.startswith("data:image/svg+xml;base64,")
    assert text.count("<object ") == 1
    assert "http" not in text
    assert "<script" not in text
    assert "Linux &lt;6&gt;" in text


def test_the_page_of_profiles_says_what_bounds_what_is_missing_and_what_was_counted() -> None:
    text = profile_page.markdown(["Linux"], [profile()])
    assert "- **syscall or copy bound**: yes. 80% of its samples" in text
    assert "- there is no py-spy here (the extra bench)" in text
    assert "counts no hardware events" in text
    assert "| cycles | not supported |  |" in text
    assert "| context-switches | 29 | 2.900 |" in text
    assert "| splice | 17,484 | 283 | 99.0 |" in text
    assert "![perf](forwarder-bulk1-perf.svg)" in text


def test_instructions_for_each_cycle_are_told_where_the_machine_counts_them() -> None:
    it = profile()
    it.counted = {"cycles": 200.0, "instructions": 300.0, "cache-misses": 1.0, "branches": 1.0}
    text = profile_page.markdown([], [it])
    assert "| instructions per cycle | 1.50 |  |" in text
    assert "counts no hardware events" not in text


def test_what_was_not_seen_has_no_table_and_no_judgement() -> None:
    empty = Profile("bulk1", "bulk", "forwarder", 1, "MB", notes=["perf: no"])
    assert [*empty.tables()] == []
    assert empty.findings() == []
    assert empty.remarks() == ["perf: no"]
