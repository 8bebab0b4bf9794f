"""What the journal keeps, and how a step's news becomes bytes and back. Pure.

Numbers travel as msgpack, whose floats are IEEE doubles: a log-probability comes back with the same bits, -0.0 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgpack

from common.errors import ContextLengthError, InvalidRequestError, MoemeshError, OverloadedError, error_from_wire
from common.ids import RequestId, SequenceId
from services.router.engine import FinishReason, RecoveryCounts, Token

MAX_CHOICES = 1 << 16
"""A choice's number in the journal is its request's number times this, plus its index."""
_RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """One HTTP request as it was accepted: everything from which it can be planned again to the same tokens."""

    reply_id: str
    created_s: int
    """It stands in the reply, and is the date that a chat template sees."""
    accepted_s: float
    """Wall clock, Unix seconds."""
    route: str
    """`completions` or `chat`."""
    tenant: str
    """A hash of the client's authorization."""
    client_request_id: str | None
    idempotency_key: str | None
    body_hash: str
    body: bytes
    """The JSON that the client sent: prompts stand in it in clear."""
    seed: int
    """It was drawn, where the client gave none."""
    is_resumable: bool
    choice_ids: tuple[RequestId, ...]

    @property
    def is_kept(self) -> bool:
        """Says whether a client may ask for it after its end."""
        return self.is_resumable or self.idempotency_key is not None


@dataclass(slots=True)
class JournalledChoice:
    """One choice of a request that was read back, or rests after its end. It is packed: most are never asked for
    again."""

    runs: list[tuple[int, bytes]] = field(default_factory=list)
    """(position of the first, packed tokens), without a hole."""
    fresh: list[Token] = field(default_factory=list)
    """The tokens after the last run."""
    sequence_id: SequenceId | None = None
    error: MoemeshError | None = None

    @property
    def tokens(self) -> list[Token]:
        """Returns all of them. Raises ValueError if a run is not what was written."""
        return [token for _, data in self.runs for token in decode_tokens(data)] + self.fresh

    @property
    def num_tokens(self) -> int:
        """Counts them without unpacking. Raises ValueError as `tokens` does."""
        if not self.runs:
            return len(self.fresh)
        first, data = self.runs[-1]
        return first + count_tokens(data) + len(self.fresh)

    @property
    def num_bytes(self) -> int:
        """Returns the size of what is packed."""
        return sum(len(data) for _, data in self.runs)


@dataclass(frozen=True, slots=True)
class JournalledRequest:
    """One request that was read back, under way or kept after its end."""

    accepted: AcceptedRequest
    choices: tuple[JournalledChoice, ...]
    ended_s: float | None
    """The wall clock at its end; None if it is not known to have ended."""
    number: int
    """It ascends with acceptance."""

    @property
    def num_tokens(self) -> int:
        """Counts the tokens of all choices without unpacking."""
        return sum(choice.num_tokens for choice in self.choices)


@dataclass(slots=True)
class StepRecord:
    """Everything that is written in one group commit. Choices and requests are told by their numbers in the journal."""

    number: int = 0
    """It ascends while a router lives; it is not written."""
    tokens: list[tuple[int, int, Token]] = field(default_factory=list)
    """(choice, position, token)."""
    placements: list[tuple[int, int]] = field(default_factory=list)
    """(choice, sequence id)."""
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    """(choice, error code, sentence)."""
    ends: list[tuple[int, float, bool]] = field(default_factory=list)
    """(request, wall clock, whether it is kept)."""

    def __bool__(self) -> bool:
        return bool(self.tokens or self.placements or self.failures or self.ends)


class RequestJournal:
    """What the front asks of the journal. It may be asked in any thread, and never waits for a disk.

    This one is that of JOURNAL=off: it keeps nothing, and nothing outlives the process.
    """

    def accept(self, accepted: AcceptedRequest) -> Future[None]:
        """Returns what is done when the request is written; then it may begin. It raises JournalError (it must not
        begin) or FencedError.

        A caller that gives up waiting says so with `end`.
        """
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def receipt(self, reply_id: str) -> int:
        """Returns what stands for all tokens of it that were handed on so far; to be asked before `end`."""
        return 0

    def has_written(self, receipt: int) -> bool:
        """Says whether all of that is in the journal now."""
        return False

    def end(self, reply_id: str, is_kept: bool, error: MoemeshError | None = None) -> None:
        """Hears that nothing more comes for it: it is deleted, or kept for the retention time with what it failed by.
        That is written within a second. One that was kept is deleted before its time."""

    def flush(self) -> Future[bool]:
        """Writes what `end` left to be written; False if the disk does not take it. Raises FencedError."""
        future: Future[bool] = Future()
        future.set_result(True)
        return future

    def trouble(self) -> str | None:
        """Says why no request can be accepted now; None while nothing is wrong."""
        return None


def encode_step(record: StepRecord) -> bytes:
    """Returns one row of the log."""
    tokens = [(choice, position, *token_fields(token)) for choice, position, token in record.tokens]
    packed: bytes = msgpack.packb((tokens, record.placements, record.failures, record.ends))
    return packed


def decode_step(data: bytes) -> StepRecord:
    """Reads a row of the log. Raises ValueError if it is not what `encode_step` makes."""
    try:
        tokens, placements, failures, ends = msgpack.unpackb(data, use_list=False)
        return StepRecord(
            tokens=[(choice, position, _token(fields)) for choice, position, *fields in tokens],
            placements=list(placements),
            failures=list(failures),
            ends=list(ends),
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"a step of the journal cannot be read: {error}") from error


def encode_tokens(tokens: Sequence[Token]) -> bytes:
    """Packs a run of one choice's tokens."""
    packed: bytes = msgpack.packb([token_fields(token) for token in tokens])
    return packed


def decode_tokens(data: bytes) -> list[Token]:
    """Unpacks a run. Raises ValueError if it is not what `encode_tokens` makes."""
    try:
        return [_token(fields) for fields in msgpack.unpackb(data, use_list=False)]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"tokens of the journal cannot be read: {error}") from error


def count_tokens(data: bytes) -> int:
    """Says how many tokens `encode_tokens` was given, by the first bytes alone. Raises ValueError if they do not
    say."""
    # msgpack's three forms of an array: 0x9n; 0xdc and 2 bytes; 0xdd and 4 bytes.
    kind = data[0] if data else 0
    if kind & 0xF0 == 0x90:
        return kind & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(kind)
    if width is None or len(data) <= width:
        raise ValueError("tokens of the journal cannot be read: they do not begin as a run does")
    return int.from_bytes(data[1 : 1 + width], "big")


def token_fields(token: Token) -> tuple[Any, ...]:
    """Returns a token as plain values; those that are mostly empty come last and are left out then."""
    if token.is_draft or token.num_rejected_drafts:
        return (*_first_fields(token), token.num_cached_tokens, token.is_draft, token.num_rejected_drafts)
    if token.num_cached_tokens:
        return (*_first_fields(token), token.num_cached_tokens)
    if token.recovery is not None or token.degraded:
        return _first_fields(token)
    if token.finish_reason is not None:
        return token.token_id, token.logprob, token.top_logprobs, token.finish_reason
    return token.token_id, token.logprob, token.top_logprobs


def _first_fields(token: Token) -> tuple[Any, ...]:
    counts = token.recovery
    recovery = None if counts is None else (counts.recoveries, counts.replayed_tokens, counts.retried_calls)
    return token.token_id, token.logprob, token.top_logprobs, token.finish_reason, recovery, token.degraded


def _token(fields: Sequence[Any]) -> Token:
    token_id, logprob, top, *rest = fields
    finish_reason = FinishReason(rest[0]) if rest and rest[0] is not None else None
    recovery = RecoveryCounts(*rest[1]) if len(rest) > 1 and rest[1] is not None else None
    degraded = len(rest) > 2 and bool(rest[2])
    num_cached = rest[3] if len(rest) > 3 else 0
    is_draft, num_rejected = rest[4:6] if len(rest) > 5 else (False, 0)
    return Token(token_id, logprob, top, finish_reason, degraded, recovery, num_cached, bool(is_draft), num_rejected)


def restored_error(code: str, message: str) -> MoemeshError:
    """Returns an error as it was told before the restart, with the same status."""
    if code == OverloadedError.code:
        return OverloadedError(message, _RETRY_AFTER_S)
    for error in (InvalidRequestError, ContextLengthError):
        if error.code == code:
            return error(message)
    return error_from_wire(code, message)
