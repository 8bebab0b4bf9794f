"""Routes that generate, and those by which a client comes back to what it asked for."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from weakref import WeakValueDictionary

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from common.errors import InvalidRequestError
from services.router.front.http.answers import error_answer, json_answer
from services.router.front.http.exchange import (
    REQUEST_ID_SCOPE,
    BodyBudget,
    ClientGoneError,
    EventStreamResponse,
    HeldBody,
    read_body,
    run_while_connected,
)
from services.router.front.intake import CHAT, COMPLETIONS, ReplyIdentity, RequestIntake
from services.router.front.live_request import ClientIdentity, LiveRequest
from services.router.front.metrics import FrontMetrics
from services.router.front.registry import RequestRegistry
from services.router.front.reply_reader import parse_event_id
from services.router.front.reply_sending import ReplySender
from services.router.front.settings import FrontSettings

MAX_KEY_CHARACTERS = 255
BODIES_AT_A_TIME = 16
"""So many of the largest size are read and parsed at once."""


class GenerationRoutes:
    """The handlers. What they keep is in the registry."""

    def __init__(
        self,
        requests: RequestRegistry,
        intake: RequestIntake,
        sender: ReplySender,
        metrics: FrontMetrics,
        settings: FrontSettings,
        wall_clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._intake = intake
        self._sender = sender
        self._metrics = metrics
        self._max_body_bytes = settings.max_body_bytes
        self._bodies = BodyBudget(settings.max_body_bytes * BODIES_AT_A_TIME)
        self._wall_clock = wall_clock
        self._key_locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def complete(self, request: Request) -> Response:
        return await self._generate(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, CHAT)

    async def show_request(self, request: Request, request_id: str) -> Response:
        """State, tokens so far, and the whole reply once there is one. Asking counts as being there."""
        try:
            async with self._requests.attach(await self._requests.find(_tenant(request), request_id)) as reader:
                return json_answer(self._sender.state(reader))
        except Exception as error:
            return error_answer(error)

    async def stream_request(self, request: Request, request_id: str) -> Response:
        """The events of a request after those that the client has."""
        try:
            live = await self._requests.find(_tenant(request), request_id)
            with self._requests.awake(live):
                taken = parse_event_id(_last_event_id(request), len(live.choices))
                if request.method == "HEAD":
                    return Response(media_type=EventStreamResponse.media_type)  # who asks so does not listen
                self._metrics.reattached.inc()
                return await run_while_connected(self._send(live, True, taken, has_come_back=True), request.receive)
        except ClientGoneError:
            raise
        except Exception as error:
            return error_answer(error)

    async def cancel_request(self, request: Request, request_id: str) -> Response:
        """Take it out of the mesh and forget it, in the journal too before this answers."""
        try:
            live = await self._requests.find(_tenant(request), request_id)
            await self._requests.delete(live)
        except Exception as error:
            return error_answer(error)
        return json_answer({"id": live.reply_id, "object": "moemesh.request.deleted", "deleted": True})

    async def _generate(self, request: Request, route: str) -> Response:
        held = HeldBody(self._bodies)
        try:
            identity = identity_of(request)
            body = await read_body(request, self._max_body_bytes, held)
            work = self._take_in(route, body, identity, _last_event_id(request), held)
            return await run_while_connected(work, request.receive)
        except ClientDisconnect as error:
            raise ClientGoneError from error
        except ClientGoneError:
            raise
        except Exception as error:
            return error_answer(error)
        finally:
            held.release()

    async def _take_in(
        self, route: str, body: bytes, identity: ClientIdentity, last_event_id: str | None, held_body: HeldBody
    ) -> Response:
        key = identity.idempotency_key
        if key is None:
            return await self._begin(route, body, identity, "", held_body)
        said = await self._intake.hash(route, body)
        # Two requests with one key at a time: the second one is to find the first.
        lock = self._key_locks.setdefault((identity.tenant, key), asyncio.Lock())
        async with AsyncExitStack() as held:
            await held.enter_async_context(lock)
            live = await self._requests.find_by_key(identity, said)
            if live is None:
                return await self._begin(route, body, identity, said, held_body, held)
        with self._requests.awake(live):
            held_body.release()
            self._metrics.reattached.inc()
            is_stream = live.asked.fields.stream is True
            taken = parse_event_id(last_event_id, len(live.choices)) if is_stream else None
            return await self._send(live, is_stream, taken)

    async def _begin(
        self,
        route: str,
        body: bytes,
        identity: ClientIdentity,
        said: str,
        held_body: HeldBody,
        held: AsyncExitStack | None = None,
    ) -> Response:
        asked = await self._intake.read(route, body, self._draw)
        live = await self._requests.admit(asked, identity, body, said)
        held_body.release()
        if held is not None:
            await held.aclose()
        # Nothing has waited since: a request that was begun has a reader, or nobody would end it.
        return await self._send(live, asked.fields.stream is True, None)

    def _draw(self, id_prefix: str) -> ReplyIdentity:
        return ReplyIdentity(f"{id_prefix}{uuid.uuid4().hex}", int(self._wall_clock()), None)

    async def _send(
        self, live: LiveRequest, is_stream: bool, taken: tuple[int, ...] | None, has_come_back: bool = False
    ) -> Response:
        is_kept = has_come_back or self._requests.is_kept(live)
        headers = {"moemesh-request-id": live.reply_id} if is_kept else {}
        async with AsyncExitStack() as stack:
            reader = await stack.enter_async_context(self._requests.attach(live, taken))
            if is_stream:
                return await self._sender.stream(reader, stack, is_kept, headers)
            return await self._sender.whole(reader, headers)


def identity_of(request: Request) -> ClientIdentity:
    """Whose request it is. Raises InvalidRequestError for headers that cannot be served."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise InvalidRequestError(f"Idempotency-Key: must have 1 to {MAX_KEY_CHARACTERS} characters")
    wish = request.headers.get("moemesh-resumable", "0")
    if wish not in ("0", "1"):
        raise InvalidRequestError("Moemesh-Resumable: must be 1 or 0")
    return ClientIdentity(_tenant(request), request.scope.get(REQUEST_ID_SCOPE), key, wish == "1")


def _tenant(request: Request) -> str:
    return hashlib.sha256(request.headers.get("authorization", "").encode("latin-1")).hexdigest()


def _last_event_id(request: Request) -> str | None:
    return request.headers.get("last-event-id") or request.query_params.get("last_event_id")
