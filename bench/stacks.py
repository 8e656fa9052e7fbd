"""Samples of a profiler: read from perf script, folded, and told by what was done. Pure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

# An address, a function perhaps with spaces, the file in parentheses: perf-script(1).
_FRAME: Final = re.compile(r"^\s+[0-9a-f]+ (?P<name>.*) \((?P<file>.*)\)$")

# What a sample is told as: the first of these of which a function is on its stack.
_COPYING: Final = re.compile(
    r"^_*(copy_(from|to)_(user|iter)|copy_user|copyin|copyout|rep_movs|memcpy|memmove"
    r"|skb_copy|copy_page_(from|to)_iter|simple_copy_to_iter)"
)
_WAKING: Final = re.compile(
    r"^_*(schedule|try_to_wake_up|wake_up|autoremove_wake|default_wake_function|ep_poll|do_epoll"
    r"|epoll_wait|ep_send_events|ep_autoremove|futex|do_futex|sock_def_readable|finish_task_switch)"
)
_LOOPBACK: Final = re.compile(r"^_*(net_rx_action|process_backlog|napi_poll)")
_INTERPRETER: Final = re.compile(r"(^|/)(libpython|python3?)[^/]*$")

COPYING, WAKING, LOOPBACK, KERNEL, INTERPRETER, OTHER = (
    "copying, in the kernel",
    "waking and waiting, in the kernel",
    "delivery on the loopback, the receiver's work",
    "the rest of the kernel",
    "the Python interpreter",
    "other code of the program",
)
KINDS: Final = (COPYING, WAKING, LOOPBACK, KERNEL, INTERPRETER, OTHER)
IN_KERNEL: Final = (COPYING, WAKING, LOOPBACK, KERNEL)


@dataclass(frozen=True, slots=True)
class Frame:
    """A function, and the file it is in."""

    name: str
    file: str

    @property
    def is_kernel(self) -> bool:
        """The kernel, or a module of it: both are in brackets, as [vdso] is, which is not."""
        return self.file.startswith("[") and self.file not in ("[vdso]", "[unknown]", "[stack]")


Stack = tuple[Frame, ...]  # the innermost function first


def parse_script(text: str) -> Counter[tuple[str, Stack]]:
    """Read perf script -F comm,ip,sym,dso: how often each stack of each program was seen."""
    found: Counter[tuple[str, Stack]] = Counter()
    for block in text.split("\n\n"):
        head, *rest = block.strip("\n").splitlines() or [""]
        frames = [match for line in rest if (match := _FRAME.match(line))]
        if frames:
            stack = tuple(Frame(match["name"], match["file"]) for match in frames)
            found[head.strip(), stack] += 1
    return found


def folded(samples: Counter[tuple[str, Stack]]) -> str:
    """A line for each stack: the outermost function first, by semicolons, then how often."""
    lines: Counter[str] = Counter()
    for (program, stack), count in samples.items():
        names = [program, *(frame.name for frame in reversed(stack))]
        lines[";".join(name.replace(";", ":") for name in names)] += count
    return "".join(f"{line} {count}\n" for line, count in sorted(lines.items()))


def kind(stack: Stack) -> str:
    """What was done when this was seen."""
    if stack[0].is_kernel:
        names = [frame.name for frame in stack if frame.is_kernel]
        for pattern, what in ((_COPYING, COPYING), (_WAKING, WAKING), (_LOOPBACK, LOOPBACK)):
            if any(map(pattern.match, names)):
                return what
        return KERNEL
    return INTERPRETER if _INTERPRETER.search(stack[0].file) else OTHER


def shares(samples: Counter[tuple[str, Stack]]) -> dict[str, float]:
    """The share of each kind, from 0 to 1."""
    counts: Counter[str] = Counter()
    for (_, stack), count in samples.items():
        counts[kind(stack)] += count
    return {what: counts[what] / counts.total() for what in KINDS} if counts else {}


def hottest(samples: Counter[tuple[str, Stack]], many: int) -> list[tuple[str, float]]:
    """The functions in which most samples were taken, with their share."""
    counts: Counter[str] = Counter()
    for (_, stack), count in samples.items():
        counts[stack[0].name] += count
    return [(name, count / counts.total()) for name, count in counts.most_common(many)]
