"""The HTTP front: OpenAI's routes over the `Engine`, and what operators ask."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from common.errors import InvalidRequestError, MoemeshError, OverloadedError, UnknownModelError
from services.router.engine import Engine
from services.router.front.choice_stream import ChoiceEvent
from services.router.front.front_settings import FrontSettings
from services.router.front.generation import GenerationRun
from services.router.front.http_exchange import (
    ClientGoneError,
    EventStreamResponse,
    ExchangeMiddleware,
    read_body,
    run_while_connected,
)
from services.router.front.metrics import FrontMetrics
from services.router.front.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
    parse_request,
)
from services.router.front.openai_schema import Request as RequestModel
from services.router.front.replies import (
    DONE_EVENT,
    KEEP_ALIVE_COMMENT,
    ChatForm,
    ChunkEncoder,
    CompletionForm,
    JsonObject,
    ReplyForm,
    ReplyHead,
    encode_json,
    error_body,
    error_event,
    merge_events,
    whole_reply,
)
from services.router.front.request_planning import Plan, RequestPlanner, draw_seed
from services.router.front.tokenizer import TextTokenizer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One generation request, ready to run."""

    fields: GenerationFields
    plan: Plan
    form: ReplyForm
    head: ReplyHead


def create_app(
    engine: Engine,
    tokenizer: TextTokenizer,
    settings: FrontSettings,
    registry: CollectorRegistry,
    *,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    draw_seed: Callable[[], int] = draw_seed,
) -> FastAPI:
    """The application, to be run by an ASGI server. `registry` gets the front's metrics and is what /metrics shows.

    `clock` (seconds, monotonic) times tokens; `wall_clock` (Unix seconds) stamps replies; `draw_seed` gives 63 random
    bits to requests without a seed.
    """
    front = _Front(engine, tokenizer, settings, FrontMetrics(registry), clock, wall_clock, draw_seed)
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(ExchangeMiddleware, metrics=front.metrics)
    app.add_api_route("/v1/completions", front.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", front.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", front.list_models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model_id:path}", front.show_model, methods=["GET"], response_model=None)
    app.add_api_route("/health", front.show_health, methods=["GET"], response_model=None)
    app.add_api_route("/ready", front.show_readiness, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", front.show_metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    return app


class _Front:
    """The handlers. Keeps nothing between requests."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        settings: FrontSettings,
        metrics: FrontMetrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        draw_seed: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self.metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._started_s = int(wall_clock())
        self._planner = RequestPlanner(tokenizer, settings, lambda: engine.max_context_tokens, draw_seed)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, self._ask_completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self._ask_chat)

    async def list_models(self) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def show_model(self, model_id: str) -> Response:
        if model_id != self._settings.served_name:
            return _error(UnknownModelError(f"the model `{model_id}` is not served here", "model"))
        return _json(self._model())

    async def show_health(self) -> Response:
        """The process lives, and no more than that."""
        return _json({"status": "alive"})

    async def show_readiness(self) -> Response:
        """Whether a token can be made end to end; 503 and what is missing if not."""
        readiness = self._engine.readiness()
        body = {"ready": readiness.ready, "detail": readiness.detail, "missing": list(readiness.missing)}
        return _json(body, 200 if readiness.ready else 503)

    async def show_metrics(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> JsonObject:
        return {
            "id": self._settings.served_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "moemesh",
            "max_model_len": self._engine.max_context_tokens,
        }

    async def _ask_completion(self, body: bytes) -> _Asked:
        fields = await self._parse(body, CompletionRequest)
        form = CompletionForm(self._tokenizer.vocabulary, fields.num_top_logprobs is not None)
        head = self._head(form)
        return _Asked(fields, await self._planner.plan_completion(fields, head.reply_id), form, head)

    async def _ask_chat(self, body: bytes) -> _Asked:
        fields = await self._parse(body, ChatCompletionRequest)
        form = ChatForm(self._tokenizer.vocabulary, fields.num_top_logprobs is not None)
        head = self._head(form)
        return _Asked(fields, await self._planner.plan_chat(fields, head.reply_id), form, head)

    async def _parse(self, body: bytes, model: type[RequestModel]) -> RequestModel:
        if len(body) > self._settings.thread_above_characters:
            return await asyncio.to_thread(parse_request, body, model)
        return parse_request(body, model)

    def _head(self, form: ReplyForm) -> ReplyHead:
        reply_id = f"{form.id_prefix}{uuid.uuid4().hex}"
        return ReplyHead(
            reply_id, int(self._wall_clock()), self._settings.served_name, self._settings.system_fingerprint
        )

    async def _answer(self, request: Request, ask: Callable[[bytes], Coroutine[Any, Any, _Asked]]) -> Response:
        try:
            asked = await ask(await read_body(request, self._settings.max_body_bytes))
            self.metrics.prompt_tokens.inc(asked.plan.num_prompt_tokens)
            if asked.fields.stream:
                return await run_while_connected(self._begin_stream(asked), request.receive)
            return await run_while_connected(self._answer_whole(asked), request.receive)
        except ClientDisconnect as error:
            raise ClientGoneError from error
        except ClientGoneError:
            raise
        except Exception as error:
            return _error(error)

    def _run(self, plan: Plan) -> GenerationRun:
        return GenerationRun(self._engine, self._tokenizer, plan.choices, self.metrics, self._clock)

    async def _answer_whole(self, asked: _Asked) -> Response:
        events: list[list[ChoiceEvent]] = [[] for _ in asked.plan.choices]
        async with self._run(asked.plan) as run:
            while not run.finished:
                for event in await run.next_events(timeout_s=None):
                    events[event.index].append(event)
        merged = [merge_events(of_choice) for of_choice in events]
        return _json(whole_reply(asked.head, asked.form, asked.plan, merged, asked.fields.return_token_ids is True))

    async def _begin_stream(self, asked: _Asked) -> Response:
        """Waits for the first token or error, so that an error still has its HTTP status; but not longer than a pause
        may be on the line."""
        encoder = ChunkEncoder(
            asked.head, asked.form, asked.plan, asked.fields.includes_usage, asked.fields.return_token_ids is True
        )
        async with AsyncExitStack() as stack:
            run = await stack.enter_async_context(self._run(asked.plan))
            first = await run.next_events(self._settings.keep_alive_interval_s)
            # From here on the response owns the run.
            return EventStreamResponse(self._stream(run, encoder, first), stack.pop_all().aclose)

    async def _stream(
        self, run: GenerationRun, encoder: ChunkEncoder, first: list[ChoiceEvent]
    ) -> AsyncGenerator[bytes]:
        events, opening = first, encoder.opening()
        try:
            while True:
                yield opening + b"".join(map(encoder.event, events)) or KEEP_ALIVE_COMMENT
                if run.finished:
                    break
                opening = b""
                events = await run.next_events(self._settings.keep_alive_interval_s)
            yield encoder.usage(run.num_completion_tokens) + DONE_EVENT
        except Exception as error:
            _log_error(error)
            yield error_event(error) + DONE_EVENT


def _json(body: JsonObject, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(body), status, headers, media_type="application/json")


def _error(error: Exception) -> Response:
    _log_error(error)
    status = error.http_status if isinstance(error, MoemeshError) else 500
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, OverloadedError) else None
    return _json(error_body(error), status, headers)


def _log_error(error: Exception) -> None:
    if not isinstance(error, MoemeshError):
        log.error("request_failed_by_defect", exc_info=error)
    elif error.http_status >= 500:
        log.warning("request_failed", code=error.code, reason=error.message)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    error_text = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(InvalidRequestError(error_text))
    body["error"]["code"] = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return _json(body, error.status_code, dict(error.headers or {}))
