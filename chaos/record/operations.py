"""Events of a history put together by operation: what each client asked, what it got, and when. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from chaos.record.history import (
    Abandoned,
    Asked,
    ChoiceFinished,
    ConnectionBroken,
    Ended,
    Event,
    PhaseBegan,
    Reattached,
    RequestFailed,
    RequestRefused,
    Tokens,
)
from chaos.record.requests import SALTED


@dataclass(slots=True)
class ChoiceRecord:
    """All that came for one choice, in the order in which it came."""

    token_ids: list[int] = field(default_factory=list)
    logprob_bits: list[str] = field(default_factory=list)
    reason: str = ""
    text_sha256: str = ""


@dataclass(slots=True)
class Operation:
    """One request of one client, from asking to its end. `phase` is the one in which it was asked."""

    name: str
    phase: str
    request: str
    asked_s: float
    choices: list[ChoiceRecord]
    arrivals_s: list[float] = field(default_factory=list)
    """When events came that brought tokens, whatever their choice."""
    ended_s: float | None = None
    how: str = "hung"
    """It is `ended`, `failed` or `abandoned`, or `hung` while none of them has come."""
    failure: str = ""
    num_breaks: int = 0
    num_reattached: int = 0
    num_refused: int = 0
    num_tokens: int = 0
    max_tokens: int = 0
    """The most tokens of each choice, as asked for."""
    is_salted: bool = False
    """It was asked with a salt that nobody had before."""
    num_found_tokens: int = 0
    """Tokens of its prompt that were found in a cache, as its usage says."""

    @property
    def is_whole(self) -> bool:
        return self.how == "ended"

    def was_streaming(self, at_s: float) -> bool:
        """Returns whether it had got tokens by then and was to get more."""
        began = bool(self.arrivals_s) and self.arrivals_s[0] <= at_s
        return began and (self.ended_s is None or self.ended_s > at_s)

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Yields (from, to) of each time without tokens, after the first token; the last one is until its end."""
        moments = [*self.arrivals_s, self.ended_s] if self.ended_s is not None else self.arrivals_s
        return ((earlier, later) for earlier, later in itertools.pairwise(moments) if later is not None)


def read_operations(events: Iterable[Event]) -> list[Operation]:
    """Puts all operations together, in the order of asking."""
    found: dict[str, Operation] = {}
    phase = ""
    for event in events:
        match event:
            case PhaseBegan():
                phase = event.phase
            case Asked():
                choices = [ChoiceRecord() for _ in range(event.num_choices)]
                found[event.operation] = Operation(
                    name=event.operation,
                    phase=phase,
                    request=event.request,
                    asked_s=event.at_s,
                    choices=choices,
                    max_tokens=event.max_tokens,
                    is_salted=SALTED in event.kind.split(", "),
                )
            case Tokens() | ChoiceFinished() | ConnectionBroken() | RequestRefused() | Reattached():
                _add(found[event.operation], event)
            case Ended() | RequestFailed() | Abandoned():
                _end(found[event.operation], event)
            case _:
                pass
    return list(found.values())


def _add(operation: Operation, event: Tokens | ChoiceFinished | ConnectionBroken | RequestRefused | Reattached) -> None:
    match event:
        case Tokens():
            choice = operation.choices[event.choice]
            choice.token_ids += event.token_ids
            choice.logprob_bits += event.logprob_bits
            operation.arrivals_s.append(event.at_s)
            operation.num_tokens += len(event.token_ids)
        case ChoiceFinished():
            choice = operation.choices[event.choice]
            choice.reason, choice.text_sha256 = event.reason, event.text_sha256
        case ConnectionBroken():
            operation.num_breaks += 1
        case RequestRefused():
            operation.num_refused += 1
        case Reattached():
            operation.num_reattached += 1


def _end(operation: Operation, event: Ended | RequestFailed | Abandoned) -> None:
    operation.ended_s = event.at_s
    match event:
        case Ended():
            operation.how = "ended"
            details = event.usage.get("prompt_tokens_details")
            operation.num_found_tokens = int(details["cached_tokens"]) if details else 0
        case RequestFailed():
            operation.how = "failed"
            operation.failure = f"{event.code}: {event.message}"
        case Abandoned():
            operation.how = "abandoned"
            operation.failure = f"neither an end nor an error within {event.waited_s:.0f} s"
