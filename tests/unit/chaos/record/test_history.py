"""What is written is read back the same, and what is no history is refused with its line."""

from __future__ import annotations

import json
import typing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.record import history as records
from chaos.record.history import (
    KINDS,
    Event,
    FaultApplied,
    History,
    HistoryError,
    decode_event,
    encode_event,
    logprob_bits,
    read_history,
)
from chaos.target import Node
from tests.support.chaos.histories import good_history

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NODE = st.builds(Node, st.text(), st.sampled_from(["router", "stage", "expert"]), st.integers(), st.text())
BY_TYPE: dict[object, st.SearchStrategy[Any]] = {
    float: FINITE,
    int: st.integers(),
    str: st.text(),
    bool: st.booleans(),
    tuple[int, ...]: st.lists(st.integers()).map(tuple),
    tuple[str, ...]: st.lists(st.text()).map(tuple),
    tuple[Node, ...]: st.lists(NODE, max_size=3).map(tuple),
    dict[str, float]: st.dictionaries(st.text(), FINITE, max_size=3),
    dict[str, Any]: st.dictionaries(st.text(), st.integers() | st.text(), max_size=3),
}


def events_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    types = typing.get_type_hints(kind)
    return st.builds(kind, **{name: BY_TYPE[a_type] for name, a_type in types.items()})


EVENTS = st.one_of([events_of(kind) for kind in KINDS.values()])


def test_every_kind_of_event_can_be_written_down() -> None:
    kinds = {a_type for a_type in vars(records).values() if isinstance(a_type, type) and issubclass(a_type, Event)}
    assert set(KINDS.values()) == kinds - {Event}


@given(st.lists(EVENTS, max_size=5))
def test_every_event_comes_back_as_it_was(events: list[Event]) -> None:
    assert read_history([encode_event(event) for event in events]).events == events


def test_a_record_from_before_roles_were_written_can_be_read() -> None:
    event = FaultApplied(1.0, 0, "kill", (), (), {}, ("spare",))
    line = encode_event(event).replace(',"roles":["spare"]', "")
    assert decode_event(line) == replace(event, roles=())


def test_every_event_goes_to_the_sink_at_once() -> None:
    lines: list[str] = []
    history = History(sink=lines.append)
    for event in good_history():
        history.add(event)
    assert read_history(lines).events == history.events == good_history()


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"event":"nothing"}', '{"event":"ended","at_s":1}', json.dumps({"at_s": 0})]
)
def test_a_line_that_is_no_event_is_named(line: str) -> None:
    with pytest.raises(HistoryError, match="line 2"):
        read_history([encode_event(good_history()[0]), line])


@given(FINITE, FINITE)
def test_the_bits_of_log_probabilities_are_equal_only_where_the_numbers_are(one: float, other: float) -> None:
    assert (logprob_bits(one) == logprob_bits(other)) == (repr(one) == repr(other))
