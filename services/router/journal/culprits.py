"""Which requests end the router, judged from how routers before this one have ended. Pure.

A router says whose turn it is before it does anything for a request (`set_aside.py`), in the mesh thread and where it
plans again what the journal has: to go on with it, or because its client asks for it, be it after its end. If it ends
while it is one's turn, and so three times in a row without a token in between, that request is set aside. So chance
does not count: a router that is killed from outside is seldom killed in those moments, and hardly three times over one
request.
An error that no request can be named for is held against all that were there and got no token since the last one. From
the third time on the younger half of those goes: a request that gets on, or has only just come, is not to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.router.journal.records import JournalledRequest

MAX_ENDS = 3
"""Ends in a row after which a request is set aside."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Says how the router before this one ended."""

    handled: str = ""
    """The request id whose turn it was in the mesh thread; empty if it was no request's."""
    restored: str = ""
    """The request id that was being planned again; empty if none was."""
    is_broken: bool = False
    """It ended by an error of its own, and not from outside."""


@dataclass(frozen=True, slots=True)
class Record:
    """What routers before this one have ended by, in a row."""

    ends: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Says by reply id how many ended while it was handled, and how many tokens it had."""
    unnamed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Says by reply id at how many errors in a row that no request can be named for it was there, and its tokens."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Says what to do before anything is restored."""

    record: Record
    """It is kept for the next start."""
    set_aside: Mapping[str, str]
    """Maps a reply id to the reason, as a sentence for its client."""


def judge(record: Record, ending: Ending, suspects: Sequence[JournalledRequest]) -> Judgement:
    """Judges how the last router ended. `suspects` are in the order of acceptance; for one that has ended nothing is
    done but to plan it again."""
    unfinished = [request for request in suspects if request.ended_s is None]
    culprit = _named(ending.handled, unfinished) or _named(ending.restored, suspects)
    if culprit is not None:
        return _judge_one(record, culprit, suspects)
    if not ending.is_broken:
        return Judgement(Record(), {})
    return _judge_all(record, unfinished)


def _named(choice_id: str, suspects: Sequence[JournalledRequest]) -> JournalledRequest | None:
    return next((request for request in suspects if choice_id in request.accepted.choice_ids), None)


def _counted(ends: Mapping[str, tuple[int, int]], request: JournalledRequest) -> tuple[int, int]:
    """Returns how many ends in a row it is now, with its tokens: one that got a token in between begins anew."""
    num_ends, num_tokens = ends.get(request.accepted.reply_id, (0, request.num_tokens))
    return num_ends + 1 if num_tokens == request.num_tokens else 1, request.num_tokens


def _judge_all(record: Record, unfinished: Sequence[JournalledRequest]) -> Judgement:
    unnamed = {request.accepted.reply_id: _counted(record.unnamed, request) for request in unfinished}
    suspects = [reply_id for reply_id, (num_ends, _) in unnamed.items() if num_ends >= MAX_ENDS]
    set_aside = {
        reply_id: f"the router crashed {unnamed.pop(reply_id)[0]} times in a row with an error that it could name no "
        "request for; of those that got no token meanwhile, the younger half was set aside"
        for reply_id in suspects[len(suspects) // 2 :]
    }
    return Judgement(Record(record.ends, unnamed), set_aside)


def _judge_one(record: Record, culprit: JournalledRequest, suspects: Sequence[JournalledRequest]) -> Judgement:
    name, lives = culprit.accepted.reply_id, {request.accepted.reply_id for request in suspects}
    ends = {reply_id: count for reply_id, count in record.ends.items() if reply_id in lives}
    num_ends, num_tokens = _counted(record.ends, culprit)
    if num_ends < MAX_ENDS:
        return Judgement(Record(ends | {name: (num_ends, num_tokens)}), {})
    ends.pop(name, None)
    when = "while it handled this request or planned it again"
    reason = f"the router ended {num_ends} times in a row {when}, which was set aside"
    return Judgement(Record(ends), {name: reason})
