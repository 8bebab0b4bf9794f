"""All requests that live or may be asked for: by id, by the client's own id, by idempotency key. In the event loop.

A request without any listener is cancelled at once if its client is a plain one. One that is resumable, or has an
idempotency key, or was restored after a restart, goes on for the grace time, and can be asked for after its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from common.errors import (
    ExecutionError,
    IdempotencyError,
    JournalError,
    MoemeshError,
    NotReadyError,
    UnknownRequestError,
)
from services.router.engine import Engine
from services.router.front.asked_request import AskedRequest, ReplyIdentity, RequestIntake
from services.router.front.front_settings import FrontSettings
from services.router.front.live_request import ClientIdentity, LiveRequest
from services.router.front.metrics import FrontMetrics
from services.router.front.reply_reader import ReplyReader
from services.router.front.tokenizer import TextTokenizer
from services.router.journal_records import AcceptedRequest, JournalledRequest, RequestJournal

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Entry:
    live: LiveRequest
    body_hash: str
    is_kept: bool
    number: int
    """Ascends with acceptance: of two with one name the newer counts, in whichever order a restart brings them back."""
    timer: asyncio.TimerHandle | None = None
    """Until it is cancelled for want of listeners, or forgotten after its end."""


class RequestRegistry:
    """See the module. Times in seconds; `wall_clock` is Unix time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        journal: RequestJournal,
        intake: RequestIntake,
        metrics: FrontMetrics,
        *,
        settings: FrontSettings,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._journal = journal
        self._intake = intake
        self._metrics = metrics
        self._grace_s = settings.resume_grace_s
        self._retention_s = settings.retention_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._entries: dict[str, _Entry] = {}
        self._by_client_id: dict[tuple[str, str], _Entry] = {}
        self._by_key: dict[tuple[str, str], _Entry] = {}
        self._last_number = 0
        self._cancelling: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    # ---- finding

    def find(self, tenant: str, request_id: str) -> LiveRequest:
        """By the reply's id or the client's own; the newest, if a client gave one twice. Raises UnknownRequestError."""
        entry = self._entries.get(request_id)
        if entry is None or entry.live.identity.tenant != tenant:
            entry = self._by_client_id.get((tenant, request_id))
        if entry is None:
            raise UnknownRequestError(f"there is no request `{request_id}` here, or none any more", "id")
        return entry.live

    def find_by_key(self, identity: ClientIdentity, body_hash: str) -> LiveRequest | None:
        """The request that has this idempotency key. Raises IdempotencyError if it came with another body."""
        if identity.idempotency_key is None:
            return None
        entry = self._by_key.get((identity.tenant, identity.idempotency_key))
        if entry is None:
            return None
        if entry.body_hash != body_hash:
            raise IdempotencyError(
                f"the Idempotency-Key `{identity.idempotency_key}` stands for a request with another body; give each "
                "request a key of its own"
            )
        return entry.live

    def is_kept(self, live: LiveRequest) -> bool:
        """Whether it goes on without its client."""
        entry = self._entries.get(live.reply_id)
        return entry is not None and entry.is_kept

    # ---- taking in

    def admit(self, asked: AskedRequest, identity: ClientIdentity, body: bytes, body_hash: str) -> LiveRequest:
        """Write it down, then begin it. The caller attaches a reader before it awaits anything.

        Raises JournalError: then it was not begun.
        """
        accepted = AcceptedRequest(
            reply_id=asked.head.reply_id,
            created_s=asked.head.created_s,
            accepted_s=self._wall_clock(),
            route=asked.route,
            tenant=identity.tenant,
            client_request_id=identity.client_request_id,
            idempotency_key=identity.idempotency_key,
            body_hash=body_hash,
            body=body,
            seed=asked.seed,
            is_resumable=identity.is_resumable,
            choice_ids=tuple(choice.request.request_id for choice in asked.plan.choices),
        )
        self._journal.accept(accepted)
        entry = self._enter(asked, identity, body_hash, accepted.is_kept, self._last_number + 1)
        self._metrics.prompt_tokens.inc(asked.plan.num_prompt_tokens)
        entry.live.start()
        return entry.live

    async def restore(self, requests: Sequence[JournalledRequest]) -> None:
        """Before anybody is served: go on with what a router before this one left. Nobody counts as gone yet.

        May be called for one part after the other; each in the order of acceptance.
        """
        for journalled in requests:
            accepted = journalled.accepted
            identity = ClientIdentity(
                accepted.tenant, accepted.client_request_id, accepted.idempotency_key, accepted.is_resumable
            )
            own = ReplyIdentity(accepted.reply_id, accepted.created_s, accepted.seed)
            try:
                asked = await self._intake.read(accepted.route, accepted.body, partial(_as_before, own))
            except MoemeshError as error:
                log.error("request_not_restored", request=accepted.reply_id, reason=error.message)
                self._journal.end(accepted.reply_id, is_kept=False)
                continue
            entry = self._enter(asked, identity, accepted.body_hash, True, journalled.number)
            if journalled.ended_s is None:
                self._arm(entry, self._grace_s, self._cancel_soon)
            entry.live.restore(journalled.choices, was_over=journalled.ended_s is not None)
            if journalled.ended_s is not None:
                self._arm(entry, journalled.ended_s + self._retention_s - self._wall_clock(), self._forget)

    def attach(self, live: LiveRequest, taken: Sequence[int] | None = None) -> ReplyReader:
        """A client listens from now on, until it leaves the reader. `taken`: see ReplyReader."""
        entry = self._entries.get(live.reply_id)
        if entry is not None and not live.has_ended:
            self._disarm(entry)
        return ReplyReader(live, self._tokenizer, taken or (0,) * len(live.choices), self._leave)

    # ---- ends

    async def delete(self, live: LiveRequest) -> None:
        """Cancel it and forget it, so that no router finds it again. Raises JournalError and FencedError."""
        await live.cancel()
        self._journal.end(live.reply_id, is_kept=False)
        # In a thread: the commit may wait for the disk, or for the mesh thread's own.
        if not await asyncio.to_thread(self._journal.flush):
            raise JournalError(
                f"the request {live.reply_id} was cancelled, but the journal cannot be written to (is the disk full?): "
                "a router that restarts before it can goes on with the request"
            )
        await self.cancel(live)

    async def cancel(self, live: LiveRequest) -> None:
        """Nobody wants more of it; it is forgotten. The journal has that within a second."""
        await live.cancel()
        entry = self._entries.get(live.reply_id)
        if entry is not None:
            self._forget(entry)

    def release(self) -> None:
        """The router ends. Kept requests let their readers go, and nobody who leaves from now on cancels anything."""
        self._is_stopping = True
        for entry in self._entries.values():
            if entry.is_kept:
                entry.live.release()

    def give_up(self) -> None:
        """The router ends, and with it what does not go on without its client: that is told, and no router goes on."""
        for entry in list(self._entries.values()):
            if not entry.is_kept:
                entry.live.fail(
                    NotReadyError(
                        "the router ends, and this request with it; one with the header Moemesh-Resumable: 1 goes on "
                        "when a router is there again"
                    )
                )

    async def close(self) -> None:
        """Stop everything, without an end in the journal: it goes on after the restart."""
        self._is_stopping = True
        for entry in list(self._entries.values()):
            self._disarm(entry)
            await entry.live.abandon()

    async def _leave(self, reader: ReplyReader) -> None:
        live = reader.live
        if live.has_ended:
            await live.settle()
            return
        entry = self._entries.get(live.reply_id)
        if self._is_stopping or entry is None or live.listeners:
            return
        if entry.is_kept:
            self._arm(entry, self._grace_s, self._cancel_soon)
        else:
            await self.cancel(live)

    def _enter(
        self, asked: AskedRequest, identity: ClientIdentity, body_hash: str, is_kept: bool, number: int
    ) -> _Entry:
        live = LiveRequest(
            asked, identity, self._engine, self._tokenizer, self._metrics, self._clock, on_end=self._note_end
        )
        self._last_number = max(self._last_number, number)
        entry = self._entries[live.reply_id] = _Entry(live, body_hash, is_kept, number)
        for name, by_name in (
            (identity.client_request_id, self._by_client_id),
            (identity.idempotency_key, self._by_key),
        ):
            if name is not None and by_name.setdefault((identity.tenant, name), entry).number < number:
                by_name[identity.tenant, name] = entry
        return entry

    def _note_end(self, live: LiveRequest) -> None:
        entry = self._entries[live.reply_id]
        self._disarm(entry)
        error = (
            live.error
            if isinstance(live.error, MoemeshError) or live.error is None
            else ExecutionError("internal error")
        )
        self._journal.end(live.reply_id, entry.is_kept and not isinstance(error, UnknownRequestError), error)
        if not entry.is_kept:
            self._forget(entry)
            return
        if live.error is not None:
            # It can be asked for by its id; a retry with the same key is to have another chance.
            self._forget_key(entry)
        self._arm(entry, self._retention_s, self._forget)

    def _cancel_soon(self, entry: _Entry) -> None:
        log.info("request_abandoned", request=entry.live.reply_id, grace_s=self._grace_s)
        self._metrics.abandoned.inc()
        task = asyncio.create_task(self.cancel(entry.live))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    def _forget(self, entry: _Entry) -> None:
        self._disarm(entry)
        identity = entry.live.identity
        self._entries.pop(entry.live.reply_id, None)
        name = (identity.tenant, identity.client_request_id or "")
        if self._by_client_id.get(name) is entry:
            del self._by_client_id[name]
        self._forget_key(entry)

    def _forget_key(self, entry: _Entry) -> None:
        key = (entry.live.identity.tenant, entry.live.identity.idempotency_key or "")
        if self._by_key.get(key) is entry:
            del self._by_key[key]

    def _arm(self, entry: _Entry, delay_s: float, act: Callable[[_Entry], None]) -> None:
        self._disarm(entry)
        entry.timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), act, entry)

    def _disarm(self, entry: _Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None


def _as_before(identity: ReplyIdentity, id_prefix: str) -> ReplyIdentity:
    return identity
