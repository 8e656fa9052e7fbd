"""Paced streams of numbered datagrams through a forwarder and back, with an account of each.

Runs as a process of its own, so that a busy test does not slow it down: one loop is clients and
upstream at once. Standard library only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Final

_HEAD: Final = struct.Struct("!II")  # flow, number
_PAD: Final = bytes(200)
_BUFFER_BYTES: Final = 4 * 1024 * 1024
# What is late by so much when all has been sent is lost.
_LATE_S: Final = 2.0


@dataclass
class Account:
    """What became of the datagrams: those lost on the way there, and of their answers.

    ``disordered``: came twice or too early, at either end. ``moved``: how often a flow had another
    upstream-side address than before. ``direct_lost``: of a stream that took no forwarder.
    """

    sent: int = 0
    lost_there: int = 0
    lost_back: int = 0
    disordered: int = 0
    moved: int = 0
    direct_lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_spotless(self) -> bool:
        """Nothing lost, repeated or reordered, and every flow the same throughout."""
        return not (self.lost_there or self.lost_back or self.disordered or self.moved)


def _socket(host: str) -> socket.socket:
    sock = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    )
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return sock


class Stream:
    """One client. ``arrived`` and ``answered`` are the numbers that came last, from 0."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = _socket(address[0])
        self.sock.connect(address)
        self.sent = 0
        self.arrived: list[int] = []
        self.answered: list[int] = []
        self.source: object = None


class Loop:
    """Clients in turn at a steady rate. The last stream goes to the upstream itself."""

    def __init__(self, address: tuple[str, int], upstream: socket.socket, flows: int) -> None:
        upstream.setblocking(False)
        self._upstream = upstream
        where = upstream.getsockname()
        self.account = Account()
        self.streams = [Stream(address) for _ in range(flows)] + [Stream((where[0], where[1]))]
        self._epoll = select.epoll()
        self._epoll.register(upstream, select.EPOLLIN)
        self._by_fd = {stream.sock.fileno(): stream for stream in self.streams}
        for fd in self._by_fd:
            self._epoll.register(fd, select.EPOLLIN)
        self.answers = 0

    def run(self, rate: int) -> None:
        """Go on until the standard input ends, and until everything has come back or is late."""
        due, turn, last_report = 0.0, 0, 0.0
        now = time.monotonic()
        ending_at = float("inf")
        while now < ending_at and not (ending_at < float("inf") and self._is_complete()):
            before, now = now, time.monotonic()
            if ending_at == float("inf"):
                due = min(due + (now - before) * rate, 100.0)  # a pause is not made up for
                while due >= 1:
                    self._send(turn % len(self.streams))
                    turn += 1
                    due -= 1
                if select.select([0], [], [], 0)[0]:
                    ending_at = now + _LATE_S
            self._turn()
            if now - last_report > 0.02:
                last_report = now
                print(self.answers, flush=True)  # noqa: T201 - read by loads.UdpLoad
        self._finish()
        print(json.dumps(asdict(self.account)), flush=True)  # noqa: T201 - read by loads.UdpLoad

    def _send(self, index: int) -> None:
        stream = self.streams[index]
        with suppress(ConnectionRefusedError):  # it tells of an earlier one, which is lost
            stream.sock.send(_HEAD.pack(index, stream.sent) + _PAD)
        stream.sent += 1

    def _turn(self) -> None:
        for fd, _ in self._epoll.poll(0.002):
            stream = self._by_fd.get(fd)
            with suppress(BlockingIOError, ConnectionRefusedError):
                for _ in range(200):
                    if stream is None:
                        self._answer()
                    else:
                        stream.answered.append(_HEAD.unpack_from(stream.sock.recv(1000))[1])
                        self.answers += 1

    def _answer(self) -> None:
        content, source = self._upstream.recvfrom(1000)
        index, number = _HEAD.unpack_from(content)
        stream = self.streams[index]
        stream.arrived.append(number)
        if source != stream.source:
            if stream.source is not None:
                self.account.moved += 1
                self._note(f"stream {index}: number {number} from {source}, was {stream.source}")
            stream.source = source
        self._upstream.sendto(content, source)

    def _is_complete(self) -> bool:
        return all(len(stream.answered) >= stream.sent for stream in self.streams)

    def _finish(self) -> None:
        account = self.account
        direct = self.streams.pop()
        account.direct_lost = direct.sent - len(set(direct.answered))
        for index, stream in enumerate(self.streams):
            account.sent += stream.sent
            there, back = set(stream.arrived), set(stream.answered)
            account.lost_there += stream.sent - len(there)
            account.lost_back += len(there - back)
            if missing := sorted(set(range(stream.sent)) - back)[:5]:
                self._note(f"stream {index}: lost {missing} of {stream.sent}")
            for numbers in (stream.arrived, stream.answered):
                wrong = [b for a, b in itertools.pairwise(numbers) if b <= a]
                account.disordered += len(wrong)
                if wrong:
                    self._note(f"stream {index}: came late or twice {wrong[:5]}")

    def _note(self, problem: str) -> None:
        if len(self.account.problems) < 20:
            self.account.problems.append(f"{time.monotonic():.3f} {problem}")


def main() -> None:
    """Run the load that the command line describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-fd", type=int, required=True)
    parser.add_argument("--rate", type=int, required=True)
    parser.add_argument("--flows", type=int, required=True)
    args = parser.parse_args()
    upstream = socket.socket(fileno=args.upstream_fd)
    Loop((args.host, args.port), upstream, args.flows).run(args.rate)


if __name__ == "__main__":
    main()
