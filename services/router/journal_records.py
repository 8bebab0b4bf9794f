"""What the journal keeps, and how a step's news becomes bytes and back. Pure.

Numbers travel as msgpack, whose floats are IEEE doubles: a log-probability comes back with the same bits, -0.0 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from common.errors import ContextLengthError, InvalidRequestError, MoemeshError, OverloadedError, error_from_wire
from common.ids import RequestId, SequenceId
from services.router.engine import FinishReason, GeneratedToken, RecoveryCounts

MAX_CHOICES = 1 << 16
"""A choice's number in the journal is its request's number times this, plus its index."""
_RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """One HTTP request as it was accepted: everything from which it can be planned again to the same tokens."""

    reply_id: str
    created_s: int
    """Stands in the reply, and is the date that a chat template sees."""
    accepted_s: float
    """Wall clock, Unix seconds."""
    route: str
    """`completions` or `chat`."""
    tenant: str
    """Hash of the client's authorization."""
    client_request_id: str | None
    idempotency_key: str | None
    body_hash: str
    body: bytes
    """JSON, as the client sent it: prompts stand in it in clear."""
    seed: int
    """Drawn, where the client gave none."""
    is_resumable: bool
    choice_ids: tuple[RequestId, ...]

    @property
    def is_kept(self) -> bool:
        """Whether somebody may ask for it after its end."""
        return self.is_resumable or self.idempotency_key is not None


@dataclass(slots=True)
class JournalledChoice:
    """One choice of a request that was read back."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    sequence_id: SequenceId | None = None
    error: MoemeshError | None = None


@dataclass(frozen=True, slots=True)
class JournalledRequest:
    """One request that was read back, under way or kept after its end."""

    accepted: AcceptedRequest
    choices: tuple[JournalledChoice, ...]
    ended_s: float | None
    """Wall clock; None: it is not known to have ended."""
    number: int
    """Ascends with acceptance."""


@dataclass(slots=True)
class StepRecord:
    """Everything that is written in one group commit. Choices and requests by their numbers in the journal."""

    tokens: list[tuple[int, int, GeneratedToken]] = field(default_factory=list)
    """(choice, position, token)."""
    placements: list[tuple[int, int]] = field(default_factory=list)
    """(choice, sequence id)."""
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    """(choice, error code, sentence)."""
    ends: list[tuple[int, float, bool]] = field(default_factory=list)
    """(request, wall clock, whether it is kept)."""

    def __bool__(self) -> bool:
        return bool(self.tokens or self.placements or self.failures or self.ends)


class RequestJournal(Protocol):
    """What the front asks of the journal. Any thread."""

    @property
    def is_durable(self) -> bool:
        """Whether everything that was handed in so far is written."""
        ...

    def accept(self, accepted: AcceptedRequest) -> None:
        """Written when it returns. Raises JournalError (then the request must not begin) or FencedError."""
        ...

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None = None) -> None:
        """Nothing more comes for it; it is deleted, or kept for the retention time with what it failed by. Written
        within a second. One that was kept is deleted before its time."""
        ...

    def flush(self) -> bool:
        """Write what `end` left to be written; False if the disk does not take it. Raises FencedError."""
        ...


class NoJournal:
    """JOURNAL=off: nothing outlives the process."""

    is_durable = False

    def accept(self, accepted: AcceptedRequest) -> None:
        """Nothing is kept."""

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None = None) -> None:
        """Nothing was kept."""

    def flush(self) -> bool:
        """Nothing is left to be written."""
        return True


def encode_step(record: StepRecord) -> bytes:
    """One row of the log."""
    tokens = [(choice, position, *token_fields(token)) for choice, position, token in record.tokens]
    packed: bytes = msgpack.packb((tokens, record.placements, record.failures, record.ends))
    return packed


def decode_step(data: bytes) -> StepRecord:
    """Raises ValueError if it is not what `encode_step` makes."""
    try:
        tokens, placements, failures, ends = msgpack.unpackb(data, use_list=False)
        return StepRecord(
            [(choice, position, _token(fields)) for choice, position, *fields in tokens],
            list(placements),
            list(failures),
            list(ends),
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"a step of the journal cannot be read: {error}") from error


def encode_tokens(tokens: Sequence[GeneratedToken]) -> bytes:
    """A run of one choice's tokens."""
    packed: bytes = msgpack.packb([token_fields(token) for token in tokens])
    return packed


def decode_tokens(data: bytes) -> list[GeneratedToken]:
    """Raises ValueError if it is not what `encode_tokens` makes."""
    try:
        return [_token(fields) for fields in msgpack.unpackb(data, use_list=False)]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"tokens of the journal cannot be read: {error}") from error


def token_fields(token: GeneratedToken) -> tuple[Any, ...]:
    """A token as plain values; those that are mostly empty come last and are left out then."""
    if token.recovery is not None or token.degraded:
        counts = token.recovery
        recovery = None if counts is None else (counts.recoveries, counts.replayed_tokens, counts.retried_calls)
        return token.token_id, token.logprob, token.top_logprobs, token.finish_reason, recovery, token.degraded
    if token.finish_reason is not None:
        return token.token_id, token.logprob, token.top_logprobs, token.finish_reason
    return token.token_id, token.logprob, token.top_logprobs


def _token(fields: Sequence[Any]) -> GeneratedToken:
    token_id, logprob, top, *rest = fields
    finish_reason = FinishReason(rest[0]) if rest and rest[0] is not None else None
    recovery = RecoveryCounts(*rest[1]) if len(rest) > 1 and rest[1] is not None else None
    degraded = len(rest) > 2 and bool(rest[2])
    return GeneratedToken(token_id, logprob, top, finish_reason, degraded, recovery)


def restored_error(code: str, message: str) -> MoemeshError:
    """An error as it was told before the restart, with the same status."""
    if code == OverloadedError.code:
        return OverloadedError(message, _RETRY_AFTER_S)
    for error in (InvalidRequestError, ContextLengthError):
        if error.code == code:
            return error(message)
    return error_from_wire(code, message)
