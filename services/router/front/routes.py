"""The HTTP front: OpenAI's routes over the `Engine`, and what operators ask."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response

from common.errors import UnknownModelError
from services.router.engine import Engine, Readiness
from services.router.front.generation_routes import GenerationRoutes
from services.router.front.http.answers import answer_http_exception, error_answer, json_answer
from services.router.front.http.connection_answers import refuse_connection
from services.router.front.http.cross_origin import CrossOriginMiddleware, OriginPolicy
from services.router.front.http.exchange import ExchangeMiddleware
from services.router.front.intake import RequestIntake
from services.router.front.metrics import FrontMetrics
from services.router.front.planning import draw_seed
from services.router.front.registry import RequestRegistry
from services.router.front.replies import JsonObject
from services.router.front.reply_sending import ReplySender
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from services.router.journal.records import NoJournal, RequestJournal


def create_app(
    engine: Engine,
    tokenizer: TextTokenizer,
    settings: FrontSettings,
    registry: CollectorRegistry,
    *,
    journal: RequestJournal | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    draw_seed: Callable[[], int] = draw_seed,
    origins: OriginPolicy = OriginPolicy(),  # noqa: B008  # it cannot be changed
) -> FastAPI:
    """The application, to be run by an ASGI server. `registry` gets the front's metrics and is what /metrics shows.

    `clock` (seconds, monotonic) times tokens; `wall_clock` (Unix seconds) stamps replies; `draw_seed` gives 63 random
    bits to requests without a seed; `origins` says which web pages may ask. Whoever runs it restores, releases and
    closes `app.state.requests`; `app.state.refuse_connection` is what answers where there are too many connections.
    """
    kept = NoJournal() if journal is None else journal
    metrics = FrontMetrics(registry)
    intake = RequestIntake(tokenizer, settings, lambda: engine.max_context_tokens, draw_seed)
    requests = RequestRegistry(
        engine, tokenizer, kept, intake, metrics, settings=settings, clock=clock, wall_clock=wall_clock
    )
    sender = ReplySender(requests.is_durable, settings.keep_alive_interval_s)
    generation = GenerationRoutes(requests, intake, sender, metrics, settings, wall_clock)
    operators = _Operators(engine, kept, settings, metrics, int(wall_clock()))
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.requests = requests
    # Pages may read such a refusal too, and it counts like any answer.
    app.state.refuse_connection = ExchangeMiddleware(CrossOriginMiddleware(refuse_connection, origins), metrics)
    app.add_middleware(CrossOriginMiddleware, policy=origins)
    app.add_middleware(ExchangeMiddleware, metrics=metrics)  # around the other: refusals have an id and count too
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
        app.add_api_route(path, handler, methods=methods, response_model=None)
    app.add_exception_handler(HTTPException, answer_http_exception)
    return app


class _Operators:
    """What is served, and how it is. Keeps nothing between requests."""

    def __init__(
        self,
        engine: Engine,
        journal: RequestJournal,
        settings: FrontSettings,
        metrics: FrontMetrics,
        started_s: int,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._settings = settings
        self._metrics = metrics
        self._started_s = started_s

    async def list_models(self) -> Response:
        return json_answer({"object": "list", "data": [self._model()]})

    async def show_model(self, model_id: str) -> Response:
        if model_id != self._settings.served_name:
            return error_answer(UnknownModelError(f"the model `{model_id}` is not served here", "model"))
        return json_answer(self._model())

    async def show_health(self) -> Response:
        """The process lives, and no more than that."""
        return json_answer({"status": "alive"})

    async def show_readiness(self) -> Response:
        """Whether a request would be taken and a token can be made end to end; 503 and what is missing if not."""
        readiness = self._engine.readiness()
        if (trouble := self._journal.trouble()) is not None:
            detail = trouble if readiness.ready else f"{readiness.detail}; {trouble}"
            readiness = Readiness(False, detail, (*readiness.missing, trouble), readiness.warnings)
        body = {
            "ready": readiness.ready,
            "detail": readiness.detail,
            "missing": list(readiness.missing),
            "warnings": list(readiness.warnings),
        }
        return json_answer(body, 200 if readiness.ready else 503)

    async def show_mesh(self) -> Response:
        """Which process holds what."""
        return json_answer(self._engine.describe_mesh())

    async def show_metrics(self) -> Response:
        return Response(await self._metrics.shared_text(), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> JsonObject:
        return {
            "id": self._settings.served_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "moemesh",
            "max_model_len": self._engine.max_context_tokens,
        }
