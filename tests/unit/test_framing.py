"""Datagrams in a stream: taken apart as they were put together, however the stream is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.model import Framing
from forwarder.relay.udp import framing

datagrams = st.lists(
    st.one_of(st.binary(max_size=20), st.integers(0, 65535).map(bytes)),
    max_size=8,
)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces, none of them empty."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[start:end] for start, end in itertools.pairwise(ends)]


def read_naively(stream: bytes) -> tuple[list[bytes], bytes]:
    """The datagrams of a whole stream by the words of RFC 1035, and what is left of it."""
    found = []
    while len(stream) >= 2 and len(stream) >= 2 + int.from_bytes(stream[:2], "big"):
        end = 2 + int.from_bytes(stream[:2], "big")
        found.append(stream[2:end])
        stream = stream[end:]
    return found, stream


@given(datagrams, st.lists(st.integers(0, 1 << 20), max_size=20))
def test_datagrams_come_out_as_they_went_in(sent: list[bytes], places: list[int]) -> None:
    stream = b"".join(framing.encode(Framing.LENGTH, content) for content in sent)
    decoder = framing.decoder(Framing.LENGTH)
    found: list[bytes] = []
    for piece in cut(stream, places):
        found += decoder.feed(memoryview(piece))
    assert found == sent
    assert not decoder.rest


@given(st.binary(max_size=2000), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_any_bytes_are_read_as_a_naive_reader_does(stream: bytes, places: list[int]) -> None:
    """After every piece, and what is incomplete is known to be."""
    decoder = framing.decoder(Framing.LENGTH)
    found: list[bytes] = []
    seen = b""
    for piece in cut(stream, places):
        seen += piece
        found += decoder.feed(memoryview(piece))
        expected, left = read_naively(seen)
        assert found == expected
        assert decoder.rest == left


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=10))
def test_raw_is_what_each_read_gives(pieces: list[bytes]) -> None:
    decoder = framing.decoder(Framing.RAW)
    assert [got for piece in pieces for got in decoder.feed(memoryview(piece))] == pieces
    assert not decoder.rest


@pytest.mark.parametrize("how", Framing)
def test_what_was_read_is_copied(how: Framing) -> None:
    """The buffer is used for other flows in between."""
    decoder = framing.decoder(how)
    buffer = bytearray(b"\x00\x03a")
    found = decoder.feed(memoryview(buffer))
    buffer[:] = b"bc\x00"
    found += decoder.feed(memoryview(buffer))
    assert found == ([b"abc"] if how is Framing.LENGTH else [b"\x00\x03a", b"bc\x00"])
