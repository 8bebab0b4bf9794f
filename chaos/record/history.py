"""The record of a run: what was asked, what came, what was hurt. Append only; the verdicts read nothing else.

A line of `history.jsonl` is one event: its kind under `event`, then its fields. Times are seconds since the run began.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from chaos.target import Node


def logprob_bits(logprob: float) -> str:
    """Returns the 64 bits of a log-probability as 16 hexadecimal digits: equal text is equality in every bit."""
    return struct.pack(">d", logprob).hex()


@dataclass(frozen=True, slots=True)
class Event:
    """Anything that is written down; `at_s` is when it was seen."""

    at_s: float


@dataclass(frozen=True, slots=True)
class RunBegan(Event):
    """The first line: it has what makes the run repeatable."""

    suite: str
    seed: int
    target: str
    model: str
    began_unix_s: float


@dataclass(frozen=True, slots=True)
class PhaseBegan(Event):
    """A phase begins: `steady`, `reference`, `baseline`, `faults`, `finish`, `quiet` or `end`."""

    phase: str


@dataclass(frozen=True, slots=True)
class Asked(Event):
    """A client begins one operation. `operation` is unique in the run; `request` names what is asked."""

    operation: str
    stream: int
    request: str
    body_sha256: str
    kind: str
    """It is `greedy` or `seeded`, and what it has besides: `stop`, `n=2`, `penalties`, `alike`, `salted`."""
    num_choices: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens(Event):
    """One server-sent event brought this for one choice; `offset` counts the tokens that the client had before it."""

    operation: str
    choice: int
    offset: int
    token_ids: tuple[int, ...]
    logprob_bits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConnectionBroken(Event):
    """A connection ended in mid-answer, or could not be opened."""

    operation: str
    reason: str


@dataclass(frozen=True, slots=True)
class RequestRefused(Event):
    """The server did not take the operation now (429, 503) and nothing of it had begun; the client asks again."""

    operation: str
    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Reattached(Event):
    """The client has the rest of its answer on a new connection."""

    operation: str
    last_event_id: str


@dataclass(frozen=True, slots=True)
class ChoiceFinished(Event):
    """A choice is over: its finish reason, and the hash of all of its text."""

    operation: str
    choice: int
    reason: str
    text_sha256: str


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """The answer is whole. `usage` is the last chunk's, with whatever the server tells of recoveries."""

    operation: str
    usage: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RequestFailed(Event):
    """The operation ended with an error: the server's own, or `connection_lost`, `not_resumable` or `ended_early`."""

    operation: str
    code: str
    message: str
    status: int = 0


@dataclass(frozen=True, slots=True)
class Abandoned(Event):
    """The client gave up: neither an end nor an error came within its deadline."""

    operation: str
    waited_s: float


@dataclass(frozen=True, slots=True)
class FaultApplied(Event):
    """A fault was put on. `victims` are the processes as they were then; `alive` names those of them that lived.

    `roles` says what each of the victims was for, in their order; it is empty where that is not known.
    """

    fault: int
    kind: str
    victims: tuple[Node, ...]
    alive: tuple[str, ...]
    parameters: dict[str, Any]
    roles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FaultHealed(Event):
    """What was done to the mesh is undone; the mesh may still be recovering."""

    fault: int
    remark: str = ""
    """What the fault has done, where that showed only after it was put on."""
    doubt: str = ""
    """Why it may not have done what it is for."""


@dataclass(frozen=True, slots=True)
class MeshWhole(Event):
    """The mesh is ready after a fault, with as many nodes, pipelines and copies as before the faults began."""

    fault: int


@dataclass(frozen=True, slots=True)
class FaultSkipped(Event):
    """A fault could not be put on.

    It is expected where the target or machine does not offer it; else no node was there to hurt.
    """

    fault: int
    """Its number, or one below 0 for a suite's entry of which none was drawn: -1 for the first entry."""
    kind: str
    reason: str
    is_expected: bool


@dataclass(frozen=True, slots=True)
class NodesSeen(Event):
    """These nodes run; it is written when that changes."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class MetricsSeen(Event):
    """What /metrics said, as sums over labels; empty where it did not answer."""

    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class ProcessSeen(Event):
    """One process as the kernel sees it."""

    name: str
    kind: str
    pid: int
    rss_bytes: int
    num_files: int
    num_sockets: int


@dataclass(frozen=True, slots=True)
class HarnessLate(Event):
    """The harness itself stood still until now; what it has seen late then may have been there in time."""

    late_s: float


KINDS: dict[str, type[Event]] = {
    "run_began": RunBegan,
    "phase_began": PhaseBegan,
    "asked": Asked,
    "tokens": Tokens,
    "broken": ConnectionBroken,
    "refused": RequestRefused,
    "reattached": Reattached,
    "choice_finished": ChoiceFinished,
    "ended": Ended,
    "failed": RequestFailed,
    "abandoned": Abandoned,
    "fault_applied": FaultApplied,
    "fault_healed": FaultHealed,
    "mesh_whole": MeshWhole,
    "fault_skipped": FaultSkipped,
    "nodes_seen": NodesSeen,
    "metrics_sample": MetricsSeen,
    "process_sample": ProcessSeen,
    "harness_late": HarnessLate,
}
"""The kinds of events, by the name that a line has for them."""
_NAMES = {kind: name for name, kind in KINDS.items()}


class HistoryError(Exception):
    """A line of a history cannot be read. It names the line."""


@dataclass(slots=True)
class History:
    """Events in the order in which they were seen. `sink` gets each line at once, so that a broken run leaves it."""

    events: list[Event] = field(default_factory=list)
    sink: Callable[[str], object] | None = None

    def add(self, event: Event) -> None:
        """Appends one event."""
        self.events.append(event)
        if self.sink is not None:
            self.sink(encode_event(event))


def encode_event(event: Event) -> str:
    """Returns one line of JSON with its line end."""
    return json.dumps({"event": _NAMES[type(event)], **asdict(event)}, separators=(",", ":")) + "\n"


def decode_event(line: str) -> Event:
    """Returns the event of a line. Raises HistoryError where it is not one."""
    try:
        values = json.loads(line)
        kind = KINDS[values.pop("event")]
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(Node(**item) if isinstance(item, dict) else item for item in value)
        return kind(**values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise HistoryError(f"no event ({error}): {line[:200]!r}") from error


def read_history(lines: Iterable[str]) -> History:
    """Reads a whole history. Raises HistoryError with the number of the line that cannot be read."""
    history = History()
    for number, line in enumerate(lines, 1):
        try:
            history.add(decode_event(line))
        except HistoryError as error:
            raise HistoryError(f"line {number}: {error}") from None
    return history
