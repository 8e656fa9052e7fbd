"""What a flow holds, as JSON and bytes, and back."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forwarder.relay.moving.flow_state import FlowState

datagrams = st.lists(st.binary(max_size=2000), max_size=10).map(tuple)
states = st.builds(
    FlowState,
    c2u=datagrams,
    u2c=datagrams,
    asked=st.none() | datagrams,
    rest=st.binary(max_size=2000),
    is_detached=st.booleans(),
    refusal=st.integers(0, 133),
)


@given(states)
@example(FlowState())
@example(FlowState(c2u=(b"",), asked=()))
def test_a_state_comes_back(state: FlowState) -> None:
    content = json.loads(json.dumps(state.as_json()))
    assert FlowState.of(content, state.as_bytes()) == state


def test_what_holds_nothing_needs_no_file() -> None:
    assert FlowState(asked=()).as_bytes() == b""


@given(states, st.integers(0, 3000), st.binary(max_size=8))
def test_bytes_that_are_cut_or_changed_are_a_state_or_refused(
    state: FlowState, at: int, more: bytes
) -> None:
    held = state.as_bytes()
    with suppress(ValueError):
        FlowState.of(state.as_json(), held[:at] + more + held[at + len(more) :])


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"holds": 3},
        {"holds": [0, 0]},
        {"holds": [0, 0, -1]},
        {"holds": [0, True, 0]},
        {"holds": [1, 0, 0]},
        {"holds": [0, 0, 1 << 70]},
        {"holds": [0, 0, 0], "refusal": "2"},
        {"holds": [0, 0, 0], "is_on_trial": 1},
    ],
)
def test_nonsense_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not what|is not"):
        FlowState.of(content, b"\xff\xff")
