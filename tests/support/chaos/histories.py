"""A record of a run in which nothing went wrong, to plant damage in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from chaos.record.history import (
    Asked,
    ChoiceFinished,
    Ended,
    Event,
    FaultApplied,
    FaultHealed,
    MeshWhole,
    MetricsSeen,
    NodesSeen,
    PhaseBegan,
    ProcessSeen,
    RunBegan,
    Tokens,
    logprob_bits,
)
from chaos.target import Node

NUM_TOKENS = 12
STEP_S = 0.1
EXPERT = Node("expert-0", "expert", 101)
NODES = (Node("router-0", "router", 99), Node("stage-0", "stage", 100), EXPERT)
QUIET = {
    "moemesh_kv_blocks_free": 64.0,
    "moemesh_kv_blocks": 64.0,
    "moemesh_requests_running": 0.0,
    "moemesh_requests_waiting": 0.0,
    "moemesh_ready": 1.0,
}
FAULTS_BEGIN_S = 10.0
FAULT_S = FAULTS_BEGIN_S + 0.55

Kind = TypeVar("Kind", bound=Event)


def token_ids(request: int, choice: int) -> tuple[int, ...]:
    """Of a choice without faults; no token comes twice in it."""
    return tuple(1000 * request + 100 * choice + number for number in range(NUM_TOKENS))


def answer(name: str, request: int, begin_s: float, num_choices: int = 1) -> list[Event]:
    """One whole operation, a token of each choice a step."""
    events: list[Event] = [Asked(begin_s, name, request, f"request-{request}", "", "greedy", num_choices, NUM_TOKENS)]
    for number in range(NUM_TOKENS):
        at_s = begin_s + STEP_S * (number + 1)
        for choice in range(num_choices):
            token_id = token_ids(request, choice)[number]
            events.append(Tokens(at_s, name, choice, number, (token_id,), (logprob_bits(-token_id / 7),)))
    end_s = begin_s + STEP_S * NUM_TOKENS
    events += [ChoiceFinished(end_s, name, choice, "length", f"text-{request}") for choice in range(num_choices)]
    return [*events, Ended(end_s, name, {})]


def processes(at_s: float) -> list[Event]:
    """All nodes as they are when all is well."""
    return [ProcessSeen(at_s, node.name, node.kind, node.pid, 300 * 2**20, 20, 10) for node in NODES]


def good_history(num_requests: int = 4) -> list[Event]:
    """Reference, baseline, one expert killed under load, quiet, end."""
    reference = [answer(f"reference-{n}", n, 1.0, 1 + n % 2) for n in range(num_requests)]
    disturbed = [answer(f"run-{n}", n, FAULTS_BEGIN_S, 1 + n % 2) for n in range(num_requests)]
    return [
        RunBegan(0.0, "test", 7, "local", "tiny", 0.0),
        PhaseBegan(1.0, "reference"),
        *(event for events in reference for event in events),
        PhaseBegan(5.0, "baseline"),
        NodesSeen(5.0, NODES),
        *processes(5.0),
        PhaseBegan(FAULTS_BEGIN_S, "faults"),
        *(event for events in disturbed for event in events),
        FaultApplied(FAULT_S, 0, "kill", (EXPERT,), (EXPERT.name,), {}, ("expert",)),
        FaultHealed(FAULT_S + 0.1, 0),
        MeshWhole(FAULT_S + 0.5, 0),
        PhaseBegan(FAULTS_BEGIN_S + 3, "finish"),
        PhaseBegan(FAULTS_BEGIN_S + 4, "quiet"),
        PhaseBegan(FAULTS_BEGIN_S + 5, "end"),
        MetricsSeen(FAULTS_BEGIN_S + 5, dict(QUIET)),
        *processes(FAULTS_BEGIN_S + 5),
    ]


def alter(events: Sequence[Event], kind: type[Kind], change: Callable[[Kind], Event | None]) -> list[Event]:
    """Every event of a kind through `change`; None drops it."""
    changed = [change(event) if isinstance(event, kind) else event for event in events]
    return [event for event in changed if event is not None]


def alter_tokens(
    events: Sequence[Event], operation: str, offset: int, change: Callable[[Tokens], Tokens | None]
) -> list[Event]:
    """One token of choice 0 of an operation."""

    def only(event: Tokens) -> Event | None:
        is_it = (event.operation, event.choice, event.offset) == (operation, 0, offset)
        return change(event) if is_it else event

    return alter(events, Tokens, only)


def later(events: Sequence[Event], operation: str, since_s: float, delay_s: float) -> list[Event]:
    """What an operation gets after a time comes later."""
    return [
        replace(event, at_s=event.at_s + delay_s)
        if isinstance(event, Tokens | ChoiceFinished | Ended) and event.operation == operation and event.at_s > since_s
        else event
        for event in events
    ]
