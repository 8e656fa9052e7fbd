"""Messages between processes about names, in pieces that fit into a channel."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from forwarder.ipc.channel import MAX_MESSAGE_BYTES
from forwarder.upstream.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from forwarder.ipc.channel import Message

_HOSTS_PER_MESSAGE: Final = 100  # of 253 characters at most


def say_hosts(op: str, hosts: Iterable[str]) -> Iterator[Message]:
    """A message about names in pieces that fit into the channel."""
    every = sorted(hosts)
    for start in range(0, len(every), _HOSTS_PER_MESSAGE):
        yield {"op": op, "hosts": every[start : start + _HOSTS_PER_MESSAGE]}


def say_answers(op: str, answers: Mapping[str, Answer]) -> Iterator[Message]:
    """A message with answers in pieces that fit into the channel."""
    part: dict[str, object] = {}
    size = 0
    for host, answer in answers.items():
        value = answer.as_json()
        length = len(json.dumps({host: value}))
        if part and size + length > MAX_MESSAGE_BYTES // 2:
            yield {"op": op, "answers": part}
            part, size = {}, 0
        part[host] = value
        size += length
    if part:
        yield {"op": op, "answers": part}


def read_answers(message: Message) -> dict[str, Answer]:
    """The answers in a message. Raises KeyError, TypeError or ValueError for nonsense."""
    answers = message["answers"]
    if not isinstance(answers, dict):
        raise TypeError("no answers")
    return {str(host): Answer.from_json(value) for host, value in answers.items()}


def read_hosts(message: Message) -> list[str]:
    """The names in a message. Raises KeyError or TypeError for nonsense."""
    hosts = message["hosts"]
    if not isinstance(hosts, list):
        raise TypeError("no names")
    return list(map(str, hosts))
