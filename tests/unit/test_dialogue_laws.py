"""The judge of dialogues finds what it is there for, and nothing else."""

from __future__ import annotations

from random import Random

import pytest
from support import dialogues
from support.dialogue_writer import written
from support.dialogues import (
    Carrier,
    Dialogue,
    Outcome,
    Pause,
    Read,
    ReadAll,
    Seen,
    Send,
    complaints,
    smaller,
)

TCP = Carrier("tcp")
UNIX = Carrier("unix", (True, True))
ENDED = Seen(sent=10, fin=True, fin_acked=True, acked=True, gone=True, read_end="eof")
CUT = Seen(sent=10, acked=True, cut=True, gone=True, closed=True)


def reader(received: int = 10, read_end: str = "eof") -> Seen:
    """A client that has read to an end, and has said nothing."""
    return Seen(received=received, read_end=read_end, fin=True, fin_acked=True, gone=True)


@pytest.mark.parametrize(
    ("client", "upstream", "carrier"),
    [
        (reader(), ENDED, TCP),
        (reader(read_end="reset"), CUT, TCP),
        (reader(received=4), CUT, UNIX),
        (Seen(received=3, closed=True, gone=True, fin=True), ENDED, TCP),
    ],
    ids=["whole", "cut", "a unix socket knows no resets", "a reader that has gone"],
)
def test_what_tcp_lets_happen_is_no_complaint(
    client: Seen, upstream: Seen, carrier: Carrier
) -> None:
    assert complaints(Outcome(client, upstream), carrier) == []


@pytest.mark.parametrize(
    ("client", "upstream", "said"),
    [
        (reader(received=9), ENDED, "9 of 10 bytes that ended by FIN"),
        (reader(read_end="reset"), ENDED, "10 of 10 bytes that ended by FIN, then 'reset'"),
        (reader(), CUT, "an end of file after 10 bytes, but it was cut"),
        (reader(9, "reset"), CUT, "9 of 10 bytes that had arrived before the reset"),
        (reader(received=11), ENDED, "11 bytes of 10"),
        (Seen(received=10, wrong_at=3, read_end="eof"), ENDED, "other bytes than were sent"),
        (Seen(stuck="ReadAll"), ENDED, "waits for ever in ReadAll"),
        (Seen(write_end="EPIPE", closed=True), Seen(fin=True), "'EPIPE' without a cause"),
    ],
    ids=["tail", "end", "looks whole", "before a reset", "more", "other", "hangs", "innocent"],
)
def test_what_must_not_happen_is_found(client: Seen, upstream: Seen, said: str) -> None:
    found = complaints(Outcome(client, upstream), TCP)
    assert any(said in one for one in found), found


def test_a_dialogue_as_code_is_the_dialogue() -> None:
    random = Random(1)
    names = {name: getattr(dialogues, name) for name in dir(dialogues)}
    for _ in range(300):
        dialogue = written(random)
        assert eval(dialogue.as_code(), names) == dialogue


def test_a_dialogue_pauses_as_often_as_there_are_pieces_to_read() -> None:
    reading = (Read(10, piece=4, pause_ms=100), ReadAll(piece=20_000, pause_ms=1000))
    assert Dialogue((Send(30_000), Send(11), Pause(50)), reading).pauses_s() == 2.35
    assert Dialogue(reading, ()).pauses_s() == 0


def test_making_a_dialogue_smaller_comes_to_an_end() -> None:
    random = Random(2)
    for _ in range(20):
        dialogue = written(random)
        steps = 0
        while (simpler := next(smaller(dialogue), None)) is not None:
            dialogue = simpler
            steps += 1
            assert steps < 1000
        assert dialogue == Dialogue((), ())
