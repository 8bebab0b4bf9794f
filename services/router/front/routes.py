"""The HTTP front: OpenAI's routes over the `Engine`, those by which a client comes back, and what operators ask."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from common.errors import InvalidRequestError, UnknownModelError
from services.router.engine import Engine, Readiness
from services.router.front.http.answers import (
    answer_http_exception,
    error_answer,
    log_error,
    refuse_connection,
)
from services.router.front.http.exchange import (
    REQUEST_ID_SCOPE,
    BodyBudget,
    EventStreamResponse,
    ExchangeMiddleware,
    HeldBody,
    read_body,
    run_while_connected,
)
from services.router.front.live_request import (
    ClientIdentity,
    LiveRequest,
    ReplyReader,
    RouterStoppingError,
    parse_event_id,
)
from services.router.front.metrics import FrontMetrics
from services.router.front.planning import CHAT, COMPLETIONS, ReplyIdentity, RequestPlanner
from services.router.front.registry import RequestRegistry
from services.router.front.replies import (
    DONE_EVENT,
    KEEP_ALIVE_COMMENT,
    ChunkEncoder,
    JsonObject,
    TokenCounts,
    create_form,
    error_body,
    error_event,
    usage_of,
    whole_reply,
)
from services.router.front.schema.openai_schema import MAX_NAME_CHARACTERS
from services.router.front.settings import FrontSettings
from services.router.front.text.choice_stream import ChoiceEvent, merge_events
from services.router.front.text.detokenizer import Vocabulary
from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.records import RequestJournal

MAX_KEY_CHARACTERS = 255
ID_PREFIXES = {COMPLETIONS: "cmpl-", CHAT: "chatcmpl-"}
BODIES_AT_A_TIME = 16
"""How many of the largest size are read and parsed at once."""


def create_app(
    engine: Engine,
    tokenizer: TextTokenizer,
    settings: FrontSettings,
    registry: CollectorRegistry,
    *,
    journal: RequestJournal | None = None,
    wall_clock: Callable[[], float] = time.time,
    random_bits: Callable[[int], int] = secrets.randbits,
) -> FastAPI:
    """Returns the application, to be run by an ASGI server. `registry` gets the front's metrics and is what /metrics
    shows.

    `wall_clock` (Unix seconds) stamps replies; `random_bits` makes seeds for requests without one. Whoever runs it
    restores, releases and closes `app.state.requests`; `app.state.refuse_connection` is what answers where there are
    too many connections.
    """
    kept = RequestJournal() if journal is None else journal
    metrics = FrontMetrics(registry)
    planner = RequestPlanner(tokenizer, settings, lambda: engine.max_context_tokens)
    requests = RequestRegistry(engine, kept, planner, metrics, settings=settings, wall_clock=wall_clock)
    sender = ReplySender(tokenizer.vocabulary, requests.is_durable, settings.keep_alive_interval_s)
    generation = GenerationRoutes(requests, planner, sender, metrics, settings, wall_clock, random_bits)
    operators = _Operators(engine, kept, settings, metrics, int(wall_clock()))
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.requests = requests
    # Pages may read such a refusal too, and it counts like any answer.
    app.state.refuse_connection = ExchangeMiddleware(refuse_connection, metrics, settings.origins)
    app.add_middleware(ExchangeMiddleware, metrics=metrics, policy=settings.origins)
    app.add_exception_handler(HTTPException, answer_http_exception)
    _add_routes(app, generation, operators)
    return app


def _add_routes(app: FastAPI, generation: GenerationRoutes, operators: _Operators) -> None:
    for method, path, handler in (
        ("POST", "/v1/completions", generation.complete),
        ("POST", "/v1/chat/completions", generation.chat),
        ("GET", "/v1/requests/{request_id}", generation.show_request),
        ("GET", "/v1/requests/{request_id}/events", generation.stream_request),
        ("DELETE", "/v1/requests/{request_id}", generation.cancel_request),
        ("GET", "/v1/models", operators.list_models),
        ("GET", "/v1/models/{model_id:path}", operators.show_model),
        ("GET", "/health", operators.show_health),
        ("GET", "/ready", operators.show_readiness),
        ("GET", "/mesh", operators.show_mesh),
        ("GET", "/metrics", operators.show_metrics),
    ):
        # HEAD is answered wherever GET is (RFC 9110, 9.1); the server keeps the body back.
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, _answering_errors(handler), methods=methods, response_model=None)


def _answering_errors(handler: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """Wraps a handler: what it raises is answered as an error of OpenAI's, unless the client is gone."""

    @wraps(handler)
    async def answer(*arguments: Any, **path_parameters: Any) -> Response:
        try:
            return await handler(*arguments, **path_parameters)
        except ClientDisconnect:
            raise
        except Exception as error:
            return error_answer(error)

    return answer


class GenerationRoutes:
    """The handlers of routes that generate. What they keep is in the registry."""

    def __init__(
        self,
        requests: RequestRegistry,
        planner: RequestPlanner,
        sender: ReplySender,
        metrics: FrontMetrics,
        settings: FrontSettings,
        wall_clock: Callable[[], float],
        random_bits: Callable[[int], int],
    ) -> None:
        self._requests = requests
        self._planner = planner
        self._sender = sender
        self._metrics = metrics
        self._max_body_bytes = settings.max_body_bytes
        self._bodies = BodyBudget(settings.max_body_bytes * BODIES_AT_A_TIME)
        self._wall_clock = wall_clock
        self._random_bits = random_bits
        self._key_locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def complete(self, request: Request) -> Response:
        return await self._generate(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, CHAT)

    async def show_request(self, request: Request, request_id: str) -> Response:
        """Shows its state, the tokens so far, and the whole reply once there is one. Asking counts as being there."""
        async with self._requests.attach(await self._requests.find(_tenant(request), request_id)) as reader:
            return JSONResponse(self._sender.state(reader))

    async def stream_request(self, request: Request, request_id: str) -> Response:
        """Streams the events of a request after those that the client has."""
        live = await self._requests.find(_tenant(request), request_id)
        with self._requests.awake(live):
            received = parse_event_id(_last_event_id(request), len(live.choices))
            if request.method == "HEAD":
                return Response(media_type=EventStreamResponse.media_type)  # such a client does not listen
            self._metrics.reattached.inc()
            return await run_while_connected(self._send(live, True, received, has_come_back=True), request.receive)

    async def cancel_request(self, request: Request, request_id: str) -> Response:
        """Takes it out of the mesh and forgets it, in the journal too before this answers."""
        live = await self._requests.find(_tenant(request), request_id)
        await self._requests.delete(live)
        return JSONResponse({"id": live.reply_id, "object": "moemesh.request.deleted", "deleted": True})

    async def _generate(self, request: Request, route: str) -> Response:
        held = HeldBody(self._bodies)
        try:
            identity = identity_of(request)
            salt = cache_salt_of(request)
            body = await read_body(request, self._max_body_bytes, held)
            body = await self._planner.add_salt(body, salt)
            work = self._accept(route, body, identity, _last_event_id(request), held)
            return await run_while_connected(work, request.receive)
        finally:
            held.release()

    async def _accept(
        self, route: str, body: bytes, identity: ClientIdentity, last_event_id: str | None, held_body: HeldBody
    ) -> Response:
        live, is_found = await self._find_or_begin(route, body, identity)
        # Nothing is waited for until it has a reader: without one nothing would end a request that was begun.
        with self._requests.awake(live):
            held_body.release()
            is_stream = live.planned.fields.stream is True
            received = None
            if is_found:
                self._metrics.reattached.inc()
                received = parse_event_id(last_event_id, len(live.choices)) if is_stream else None
            return await self._send(live, is_stream, received)

    async def _find_or_begin(self, route: str, body: bytes, identity: ClientIdentity) -> tuple[LiveRequest, bool]:
        """Returns the request, and whether it was found by its key."""
        if identity.idempotency_key is None:
            return await self._begin(route, body, identity, ""), False
        said = await self._planner.hash(route, body)
        # Two requests with one key at a time: the second one is to find the first.
        async with self._key_locks.setdefault((identity.tenant, identity.idempotency_key), asyncio.Lock()):
            found = await self._requests.find_by_key(identity, said)
            if found is not None:
                return found, True
            return await self._begin(route, body, identity, said), False

    async def _begin(self, route: str, body: bytes, identity: ClientIdentity, said: str) -> LiveRequest:
        reply_id = f"{ID_PREFIXES[route]}{uuid.uuid4().hex}"
        drawn = ReplyIdentity(reply_id, int(self._wall_clock()), self._random_bits(63))
        planned = await self._planner.read(route, body, drawn)
        return await self._requests.admit(planned, identity, body, said)

    async def _send(
        self, live: LiveRequest, is_stream: bool, received: tuple[int, ...] | None, has_come_back: bool = False
    ) -> Response:
        is_kept = has_come_back or self._requests.is_kept(live)
        headers = {"moemesh-request-id": live.reply_id} if is_kept else {}
        async with AsyncExitStack() as stack:
            reader = await stack.enter_async_context(self._requests.attach(live, received))
            if is_stream:
                return await self._sender.stream(reader, stack, is_kept, headers)
            return await self._sender.whole(reader, headers)


def identity_of(request: Request) -> ClientIdentity:
    """Returns whose request it is. Raises InvalidRequestError for headers that cannot be served."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise InvalidRequestError(f"Idempotency-Key: must have 1 to {MAX_KEY_CHARACTERS} characters")
    wish = request.headers.get("moemesh-resumable", "0")
    if wish not in ("0", "1"):
        raise InvalidRequestError("Moemesh-Resumable: must be 1 or 0")
    return ClientIdentity(_tenant(request), request.scope.get(REQUEST_ID_SCOPE), key, wish == "1")


def cache_salt_of(request: Request) -> str | None:
    """Returns the salt that its header says; None: it has no such header. Raises InvalidRequestError for another number
    of them, or a length that cannot be served."""
    lines = request.headers.getlist("moemesh-cache-salt")
    if len(lines) > 1:
        raise InvalidRequestError("Moemesh-Cache-Salt: must be given once")
    if lines and not 0 < len(lines[0]) <= MAX_NAME_CHARACTERS:
        raise InvalidRequestError(f"Moemesh-Cache-Salt: must have 1 to {MAX_NAME_CHARACTERS} characters")
    return lines[0] if lines else None


def _tenant(request: Request) -> str:
    return hashlib.sha256(request.headers.get("authorization", "").encode("latin-1")).hexdigest()


def _last_event_id(request: Request) -> str | None:
    return request.headers.get("last-event-id") or request.query_params.get("last_event_id")


class ReplySender:
    """Answers with what a reader gives; keeps nothing between requests. The caller has entered the reader."""

    def __init__(
        self, vocabulary: Vocabulary, is_durable: Callable[[LiveRequest], bool], keep_alive_interval_s: float
    ) -> None:
        """`is_durable` says whether all tokens of a request that its clients have are in the journal."""
        self._vocabulary = vocabulary
        self._is_durable = is_durable
        self._keep_alive_interval_s = keep_alive_interval_s

    async def whole(self, reader: ReplyReader, headers: dict[str, str]) -> Response:
        """Waits for all of the reply. Raises what the mesh raised."""
        events: list[list[ChoiceEvent]] = [[] for _ in reader.live.choices]
        while not reader.finished:
            for event in await reader.next_events(timeout_s=None):
                events[event.index].append(event)
        return JSONResponse(self._reply(reader, events), headers=headers)

    async def stream(
        self, reader: ReplyReader, stack: AsyncExitStack, has_ids: bool, headers: dict[str, str]
    ) -> Response:
        """Waits for the first token or error, so that an error still has its HTTP status; but not longer than a pause
        may be on the line. From then on the response owns what is on the stack. Raises what the mesh raised."""
        planned = reader.live.planned
        encoder = ChunkEncoder(planned, create_form(planned, self._vocabulary), reader.received if has_ids else None)
        first = await reader.next_events(self._keep_alive_interval_s)
        return EventStreamResponse(self._events(reader, encoder, first), stack.pop_all().aclose, headers)

    def state(self, reader: ReplyReader) -> JsonObject:
        """Returns what there is so far, and the whole reply or the error once it has ended."""
        live = reader.live
        events: list[list[ChoiceEvent]] = [[] for _ in live.choices]
        for event in reader.pop_events():
            events[event.index].append(event)
        if reader.finished:
            state = "finished"
        else:
            state = "running" if live.error is None else "failed"
        return {
            "id": live.reply_id,
            "object": "moemesh.request",
            "created": live.planned.identity.created_s,
            "state": state,
            "choices": [_choice_so_far(live, index, of_choice) for index, of_choice in enumerate(events)],
            "reply": self._reply(reader, events) if reader.finished else None,
            "error": None if live.error is None or reader.finished else error_body(live.error)["error"],
        }

    async def _events(
        self, reader: ReplyReader, encoder: ChunkEncoder, first: list[ChoiceEvent]
    ) -> AsyncGenerator[bytes]:
        events, opening = first, encoder.opening()
        try:
            while True:
                yield opening + b"".join(map(encoder.event, events)) or KEEP_ALIVE_COMMENT
                if reader.finished:
                    break
                opening = b""
                events = await reader.next_events(self._keep_alive_interval_s)
            yield encoder.usage(_token_counts(reader), self._extension(reader)) + DONE_EVENT
        except RouterStoppingError:
            return  # without [DONE]: the client comes back for the rest
        except Exception as error:
            log_error(error)
            yield error_event(error) + DONE_EVENT

    def _reply(self, reader: ReplyReader, events: list[list[ChoiceEvent]]) -> JsonObject:
        planned = reader.live.planned
        is_extended = reader.live.is_resumable or planned.fields.includes_usage
        return whole_reply(
            planned,
            create_form(planned, self._vocabulary),
            [merge_events(of_choice) for of_choice in events],
            usage_of(planned, _token_counts(reader), self._extension(reader) if is_extended else None),
        )

    def _extension(self, reader: ReplyReader) -> JsonObject:
        """Returns what `usage` tells beside OpenAI's counts: what it took to finish the reply in spite of losses, and
        whether every token of it is in the journal now."""
        return {**asdict(reader.live.recovery), "durable": self._is_durable(reader.live)}


def _token_counts(reader: ReplyReader) -> TokenCounts:
    live = reader.live
    return TokenCounts(
        reader.num_completion_tokens, live.num_cached_tokens, live.num_accepted_drafts, live.num_rejected_drafts
    )


def _choice_so_far(live: LiveRequest, index: int, events: list[ChoiceEvent]) -> JsonObject:
    tokens = live.choices[index].tokens
    return {
        "index": index,
        "num_tokens": len(tokens),
        "token_ids": [token.token_id for token in tokens],
        "text": "".join(event.text for event in events),
        "finish_reason": events[-1].finish_reason if events else None,
    }


@dataclass(frozen=True, slots=True)
class _Operators:
    """Answers what operators ask: what is served, and how. Keeps nothing between requests."""

    engine: Engine
    journal: RequestJournal
    settings: FrontSettings
    metrics: FrontMetrics
    started_s: int

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def show_model(self, model_id: str) -> Response:
        if model_id != self.settings.served_name:
            raise UnknownModelError(f"the model `{model_id}` is not available here", "model")
        return JSONResponse(self._model())

    async def show_health(self) -> Response:
        """Says that the process lives, and no more than that."""
        return JSONResponse({"status": "alive"})

    async def show_readiness(self) -> Response:
        """Says whether a request would be accepted and a token can be made end to end; if not, the status is 503, and
        it says what is missing."""
        readiness = self.engine.readiness()
        if (trouble := self.journal.trouble()) is not None:
            detail = trouble if readiness.ready else f"{readiness.detail}; {trouble}"
            readiness = Readiness(False, detail, (*readiness.missing, trouble), readiness.warnings)
        return JSONResponse(asdict(readiness), 200 if readiness.ready else 503)

    async def show_mesh(self) -> Response:
        """Says which process holds what."""
        return JSONResponse(self.engine.describe_mesh())

    async def show_metrics(self) -> Response:
        return Response(await self.metrics.shared_text(), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> JsonObject:
        return {
            "id": self.settings.served_name,
            "object": "model",
            "created": self.started_s,
            "owned_by": "moemesh",
            "max_model_len": self.engine.max_context_tokens,
        }
