"""All requests that live or may be asked for: by id, by the client's own id, by idempotency key. In the event loop.

A request without any listener is cancelled at once if its client is a plain one. One that is resumable, or has an
idempotency key, or was restored after a restart, goes on for the grace time, and can be asked for after its end.

One that has ended and has no listener rests: packed, without its plan. So does one that a router before this one has
left, until a client asks for it or, if it has not ended, until it is its turn to go on. How much is kept is bounded
(`kept_bounds.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import structlog

from common.errors import (
    ExecutionError,
    IdempotencyError,
    JournalError,
    MoemeshError,
    NotReadyError,
    OverloadedError,
    UnknownRequestError,
)
from services.router.engine import Engine
from services.router.front.kept_bounds import KeptBounds
from services.router.front.live_request import ClientIdentity, LiveRequest, ReplyReader
from services.router.front.metrics import FrontMetrics
from services.router.front.planning import PlannedRequest, ReplyIdentity, RequestPlanner
from services.router.front.settings import FrontSettings
from services.router.journal.records import (
    AcceptedRequest,
    JournalledChoice,
    JournalledRequest,
    RequestJournal,
    encode_tokens,
)

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class KnownRequest:
    """One request, `live`, `resting` or both: one that has ended and is being read is both."""

    accepted: AcceptedRequest
    is_kept: bool
    number: int
    """It ascends with acceptance: of two with one name the newer counts, in whichever order they come back."""
    num_bytes: int
    """What it counts for in the bounds."""
    live: LiveRequest | None = None
    resting: JournalledRequest | None = None
    is_restored: bool = False
    """A router before this one has accepted it."""
    receipt: int = 0
    """The journal's receipt for its tokens, once it has ended."""
    timer: asyncio.TimerHandle | None = None
    """It runs until the request is cancelled for want of listeners, or forgotten after its end."""
    waking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ended_s(self) -> float | None:
        """Returns the wall clock at its end; None if it has not ended."""
        return None if self.resting is None else self.resting.ended_s

    @property
    def has_failed(self) -> bool:
        """Says whether it ended with an error: a retry with its key is to have another chance."""
        return self.resting is not None and any(choice.error is not None for choice in self.resting.choices)

    @property
    def is_unfinished(self) -> bool:
        """Says whether it was restored, and its turn to go on has not come."""
        return self.live is None and self.ended_s is None

    @property
    def goes_on_after(self) -> tuple[bool, int]:
        """Orders unfinished ones: those that had a place in a pipeline come first, then acceptance counts."""
        has_place = self.resting is not None and any(choice.sequence_id is not None for choice in self.resting.choices)
        return not has_place, self.number


class KnownRequests:
    """Finds requests by reply id, and by a tenant's own id and key, of which the newest counts."""

    def __init__(self) -> None:
        self._by_id: dict[str, KnownRequest] = {}
        self._by_client_id: dict[tuple[str, str], KnownRequest] = {}
        self._by_key: dict[tuple[str, str], KnownRequest] = {}
        self.last_number = 0

    def get(self, reply_id: str) -> KnownRequest | None:
        """Returns the request of that id, of any tenant."""
        return self._by_id.get(reply_id)

    def find(self, tenant: str, request_id: str) -> KnownRequest | None:
        """Returns the request by the reply's id or the client's own, if it is this tenant's."""
        known = self._by_id.get(request_id)
        if known is None or known.accepted.tenant != tenant:
            known = self._by_client_id.get((tenant, request_id))
        return known

    def find_by_key(self, identity: ClientIdentity) -> KnownRequest | None:
        """Returns the request with the client's key; None if it gave none, too."""
        return self._by_key.get((identity.tenant, identity.idempotency_key or ""))

    def all(self) -> list[KnownRequest]:
        """Returns a copy of the list."""
        return list(self._by_id.values())

    def add(self, known: KnownRequest) -> None:
        """Adds the request under all of its names."""
        accepted = known.accepted
        self.last_number = max(self.last_number, known.number)
        self._by_id[accepted.reply_id] = known
        for name, by_name in (
            (accepted.client_request_id, self._by_client_id),
            (accepted.idempotency_key, self._by_key),
        ):
            if name is not None and by_name.setdefault((accepted.tenant, name), known).number < known.number:
                by_name[accepted.tenant, name] = known

    def remove(self, known: KnownRequest) -> bool:
        """Removes the request from all of its names. Returns False if it was not here."""
        if self._by_id.get(known.accepted.reply_id) is not known:
            return False
        del self._by_id[known.accepted.reply_id]
        name = (known.accepted.tenant, known.accepted.client_request_id or "")
        if self._by_client_id.get(name) is known:
            del self._by_client_id[name]
        self.forget_key(known)
        return True

    def forget_key(self, known: KnownRequest) -> None:
        """Takes the key from it: a request with the same key is another one from now on."""
        key = (known.accepted.tenant, known.accepted.idempotency_key or "")
        if self._by_key.get(key) is known:
            del self._by_key[key]


def was_refused(known: KnownRequest, live: LiveRequest) -> bool:
    """Says whether the mesh has not accepted it at all: nothing of it is worth being kept."""
    is_refusal = isinstance(live.error, OverloadedError | NotReadyError)
    return is_refusal and not known.is_restored and not any(choice.tokens for choice in live.choices)


def packed(live: LiveRequest, error: MoemeshError | None) -> tuple[JournalledChoice, ...]:
    """Returns its choices as they rest; the first one has what the request failed by."""
    return tuple(
        JournalledChoice([(0, encode_tokens(choice.tokens))], error=error if choice is live.choices[0] else None)
        for choice in live.choices
    )


class RequestRegistry:
    """Keeps all requests, as the module says. Times are in seconds; `wall_clock` is Unix time."""

    def __init__(
        self,
        engine: Engine,
        journal: RequestJournal,
        planner: RequestPlanner,
        metrics: FrontMetrics,
        *,
        settings: FrontSettings,
        wall_clock: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._planner = planner
        self._metrics = metrics
        self._grace_s = settings.resume_grace_s
        self._retention_s = settings.retention_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._bounds = KeptBounds(settings.max_kept_requests, settings.max_kept_bytes)
        self._known = KnownRequests()
        self._cancelling: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self.refuse_set_aside: Callable[[str, str], None] = lambda tenant, name: None
        """Raises SetAsideError if this tenant's request of that name was set aside. Whoever runs this knows."""
        self.attend_restored: Callable[[str], None] = lambda choice_id: None
        """It is told which request is about to be planned again, by its first choice; the empty string once none is."""
        self._planned_again: list[str] = []
        """Those that are being planned again, by their first choices: several, while threads read long ones."""

    # ---- finding

    async def find(self, tenant: str, request_id: str) -> LiveRequest:
        """Returns the request by the reply's id or the client's own, the newest if a client gave one twice. Raises
        UnknownRequestError and SetAsideError."""
        entry = self._known.find(tenant, request_id)
        if entry is None:
            self.refuse_set_aside(tenant, request_id)
            raise UnknownRequestError(f"there is no request `{request_id}` here, or not any more", "id")
        return await self._awake(entry)

    async def find_by_key(self, identity: ClientIdentity, body_hash: str) -> LiveRequest | None:
        """Returns the request that has this idempotency key. Raises IdempotencyError if it came with another body, and
        SetAsideError."""
        entry = self._known.find_by_key(identity)
        if entry is None:
            self.refuse_set_aside(identity.tenant, identity.idempotency_key or "")
            return None
        if entry.accepted.body_hash != body_hash:
            raise IdempotencyError(
                f"the Idempotency-Key `{identity.idempotency_key}` stands for a request with another body; give each "
                "request a key of its own"
            )
        return await self._awake(entry)

    def is_kept(self, live: LiveRequest) -> bool:
        """Says whether it goes on without its client."""
        entry = self._known.get(live.reply_id)
        return entry is not None and entry.is_kept

    def is_durable(self, live: LiveRequest) -> bool:
        """Says whether all tokens that its clients have are in the journal."""
        return self._journal.has_written(live.receipt if live.has_ended else self._journal.receipt(live.reply_id))

    # ---- taking in

    async def admit(
        self, planned: PlannedRequest, identity: ClientIdentity, body: bytes, body_hash: str
    ) -> LiveRequest:
        """Writes it down, then begins it. The caller attaches a reader before it awaits anything.

        Raises OverloadedError, NotReadyError (nothing was written then) and JournalError: it was not begun.
        """
        accepted = AcceptedRequest(
            reply_id=planned.identity.reply_id,
            created_s=planned.identity.created_s,
            accepted_s=self._wall_clock(),
            route=planned.fields.route,
            tenant=identity.tenant,
            client_request_id=identity.client_request_id,
            idempotency_key=identity.idempotency_key,
            body_hash=body_hash,
            body=body,
            seed=planned.seed,
            is_resumable=identity.is_resumable,
            choice_ids=tuple(choice.request.request_id for choice in planned.choices),
        )
        self._engine.check_room(len(planned.choices))
        self._bounds.check(accepted.is_kept, len(body), self._wall_clock())
        # Counted before anything is waited for: two requests cannot both take the last place.
        self._bounds.add(accepted.is_kept, len(body))
        try:
            await self._written(accepted)
        except BaseException:
            self._bounds.remove(accepted.is_kept, len(body))
            raise
        entry = KnownRequest(accepted, accepted.is_kept, self._known.last_number + 1, len(body))
        self._known.add(entry)
        entry.live = self._live(entry, planned)
        self._metrics.prompt_tokens.inc(planned.num_prompt_tokens)
        entry.live.start()
        return entry.live

    def restore(self, requests: Sequence[JournalledRequest]) -> None:
        """Brings back what a router before this one has left, by acceptance, before any client is served. No client
        counts as gone yet.

        All of it can be found from now on; `go_on` goes on with what has not ended.
        """
        for journalled in requests:
            num_bytes = len(journalled.accepted.body) + sum(choice.num_bytes for choice in journalled.choices)
            entry = KnownRequest(journalled.accepted, True, journalled.number, num_bytes, is_restored=True)
            entry.resting = journalled
            self._bounds.add(True, num_bytes)
            self._known.add(entry)
        for entry in sorted(self._known.all(), key=lambda entry: entry.ended_s or 0.0):
            ended_s = entry.ended_s
            if ended_s is None:
                self._arm(entry, self._grace_s, self._cancel_soon)
            else:
                self._bounds.note_end(entry.accepted.reply_id, ended_s + self._retention_s)
                self._arm(entry, ended_s + self._retention_s - self._wall_clock(), self._forget)
                if entry.has_failed:
                    self._known.forget_key(entry)

    async def go_on(self) -> None:
        """Goes on with all that was restored and has not ended, first with what stages may have a cache of."""
        waiting = [entry for entry in self._known.all() if entry.is_unfinished]
        for entry in sorted(waiting, key=lambda entry: entry.goes_on_after):
            with suppress(UnknownRequestError):  # the log has the reason
                await self._awake(entry)
            await asyncio.sleep(0)  # clients that ask meanwhile are answered

    async def _written(self, accepted: AcceptedRequest) -> None:
        try:
            await asyncio.wrap_future(self._journal.accept(accepted))
        except BaseException:
            # It may be on its way to the disk: a router after this one must not resume it.
            self._journal.end(accepted.reply_id, is_kept=False)
            raise

    async def _awake(self, entry: KnownRequest) -> LiveRequest:
        """Plans it again, if it rests. Raises UnknownRequestError, and forgets it, if that cannot be done."""
        async with entry.waking:
            if entry.live is not None:
                return entry.live
            try:
                with self._attended(entry.accepted.choice_ids[0]):
                    return await self._plan_again(entry)
            except Exception as error:  # whatever is wrong with one request costs that request, and no other
                self._lose(entry, error)
                raise UnknownRequestError(
                    f"the request `{entry.accepted.reply_id}` cannot be planned again here, and was forgotten", "id"
                ) from error

    async def _plan_again(self, entry: KnownRequest) -> LiveRequest:
        accepted, resting = entry.accepted, entry.resting
        assert resting is not None, "one or the other"
        identity = ReplyIdentity(accepted.reply_id, accepted.created_s, accepted.seed, is_new=False)
        planned = await self._planner.read(accepted.route, accepted.body, identity)
        self.attend_restored(accepted.choice_ids[0])  # another one may have come while a thread read this one
        live = self._live(entry, planned)
        if self._known.get(accepted.reply_id) is not entry:
            raise UnknownRequestError("it was cancelled meanwhile")
        entry.live = live
        if resting.ended_s is None:
            entry.resting = None
        live.restore(resting.choices, was_over=resting.ended_s is not None, counts_as_recovery=entry.is_restored)
        return live

    @contextmanager
    def _attended(self, choice_id: str) -> Iterator[None]:
        """Says that this one is planned again, and afterwards which one still is: the last of those that came, in
        whichever order they go."""
        self._planned_again.append(choice_id)
        self.attend_restored(choice_id)
        try:
            yield
        finally:
            self._planned_again.remove(choice_id)
            self.attend_restored(self._planned_again[-1] if self._planned_again else "")

    def _lose(self, entry: KnownRequest, error: Exception) -> None:
        log.error(
            "request_not_restored",
            request=entry.accepted.reply_id,
            reason=str(error),
            exc_info=None if isinstance(error, MoemeshError) else error,
        )
        self._journal.end(entry.accepted.reply_id, is_kept=False)
        self._forget(entry)

    @asynccontextmanager
    async def attach(self, live: LiveRequest, received: Sequence[int] | None = None) -> AsyncGenerator[ReplyReader]:
        """Lets a client listen for as long as it is in this; nothing is waited for before. `received`: see
        ReplyReader."""
        entry = self._known.get(live.reply_id)
        if entry is not None and not live.has_ended:
            self._disarm(entry)
        reader = ReplyReader(live, self._planner.tokenizer.vocabulary, received or (0,) * len(live.choices))
        live.listeners.add(reader)
        try:
            yield reader
        finally:
            live.listeners.discard(reader)
            reader.close()
            await self._leave(live)

    @contextmanager
    def awake(self, live: LiveRequest) -> Iterator[None]:
        """Keeps it awake while a client decides whether it listens. One that has ended, and that has no reader by the
        end of this, rests again."""
        try:
            yield
        finally:
            entry = self._known.get(live.reply_id)
            if entry is not None and live.has_ended:
                self._rest(entry)

    # ---- ends

    async def delete(self, live: LiveRequest) -> None:
        """Cancels it and forgets it, so that no router finds it again. Raises JournalError and FencedError."""
        await live.cancel()
        self._journal.end(live.reply_id, is_kept=False)
        if not await asyncio.wrap_future(self._journal.flush()):
            raise JournalError(
                f"the request {live.reply_id} was cancelled, but the journal cannot be written to (is the disk full?): "
                "if the router restarts before it can be, it resumes the request"
            )
        await self.cancel(live)

    async def cancel(self, live: LiveRequest) -> None:
        """Cancels it and forgets it, since no more of it is wanted. The journal has that within a second."""
        await live.cancel()
        entry = self._known.get(live.reply_id)
        if entry is not None:
            self._forget(entry)

    def release(self) -> None:
        """Lets the readers of kept requests go, since the router ends. Leaving cancels nothing from now on."""
        self._is_stopping = True
        for entry in self._known.all():
            if entry.is_kept and entry.live is not None:
                entry.live.release()

    def give_up(self) -> None:
        """Ends what does not go on without its client, since the router ends: no router resumes those."""
        for entry in self._known.all():
            if not entry.is_kept and entry.live is not None:
                entry.live.fail(
                    NotReadyError(
                        "the router stops, and this request with it; one with the header Moemesh-Resumable: 1 goes on "
                        "when a router is there again"
                    )
                )

    async def close(self) -> None:
        """Stops everything, without an end in the journal: it goes on after the restart."""
        self._is_stopping = True
        for entry in self._known.all():
            self._disarm(entry)
            if entry.live is not None:
                await entry.live.abandon()

    async def _leave(self, live: LiveRequest) -> None:
        entry = self._known.get(live.reply_id)
        if live.has_ended:
            await live.settle()
            if entry is not None:
                self._rest(entry)
            return
        if self._is_stopping or entry is None or live.listeners:
            return
        if entry.is_kept:
            self._arm(entry, self._grace_s, self._cancel_soon)
        else:
            await self.cancel(live)

    def _live(self, entry: KnownRequest, planned: PlannedRequest) -> LiveRequest:
        live = LiveRequest(
            planned,
            entry.accepted.is_resumable,
            self._engine,
            self._planner.tokenizer.vocabulary,
            self._metrics,
            self._clock,
            on_end=self._note_end,
        )
        live.receipt = entry.receipt
        return live

    def _note_end(self, live: LiveRequest) -> None:
        entry = self._known.get(live.reply_id)
        if entry is None or entry.resting is not None:
            return  # it was forgotten, or had ended before it was read again
        self._disarm(entry)
        error = (
            live.error
            if isinstance(live.error, MoemeshError) or live.error is None
            else ExecutionError("internal error")
        )
        entry.receipt = live.receipt = self._journal.receipt(live.reply_id)
        is_kept = entry.is_kept and not was_refused(entry, live)
        self._journal.end(live.reply_id, is_kept and not isinstance(error, UnknownRequestError), error)
        if not is_kept:
            self._forget(entry)
            return
        if live.error is not None:
            # It can be asked for by its id; a retry with the same key is to have another chance.
            self._known.forget_key(entry)
        self._keep(entry, live, error)

    def _keep(self, entry: KnownRequest, live: LiveRequest, error: MoemeshError | None) -> None:
        """Keeps a request that has ended, so that it can be asked for."""
        ended_s = self._wall_clock()
        entry.resting = JournalledRequest(entry.accepted, packed(live, error), ended_s, entry.number)
        self._bounds.remove(entry.is_kept, entry.num_bytes)
        entry.num_bytes = len(entry.accepted.body) + sum(choice.num_bytes for choice in entry.resting.choices)
        self._bounds.add(entry.is_kept, entry.num_bytes)
        self._bounds.note_end(entry.accepted.reply_id, ended_s + self._retention_s)
        self._arm(entry, self._retention_s, self._forget)
        self._rest(entry)

    def _rest(self, entry: KnownRequest) -> None:
        """Lets its plan and its tokens go, if they have no reader."""
        if entry.resting is not None and entry.live is not None and not entry.live.listeners:
            entry.live = None

    def _cancel_soon(self, entry: KnownRequest) -> None:
        log.info("request_abandoned", request=entry.accepted.reply_id, grace_s=self._grace_s)
        self._metrics.abandoned.inc()
        if entry.live is None:  # restored, and its turn to go on has not come
            self._journal.end(entry.accepted.reply_id, is_kept=False)
            self._forget(entry)
            return
        task = asyncio.create_task(self.cancel(entry.live))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    def _forget(self, entry: KnownRequest) -> None:
        self._disarm(entry)
        if self._known.remove(entry):
            self._bounds.remove(entry.is_kept, entry.num_bytes)
            self._bounds.forget_end(entry.accepted.reply_id)

    def _arm(self, entry: KnownRequest, delay_s: float, act: Callable[[KnownRequest], None]) -> None:
        self._disarm(entry)
        entry.timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), act, entry)

    def _disarm(self, entry: KnownRequest) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
