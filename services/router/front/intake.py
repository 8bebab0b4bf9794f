"""One generation request, checked and planned: from an HTTP body, or from the journal to the same tokens."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import structlog

from services.router.front.planning import PlannedRequest, ReplyIdentity, RequestPlanner
from services.router.front.schema.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    Request,
    parse_request,
)
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer

log = structlog.get_logger(__name__)

MAX_TOLD_FIELDS, MAX_TOLD_CHARACTERS = 200, 100
COMPLETIONS, CHAT = CompletionRequest.route, ChatCompletionRequest.route
Result = TypeVar("Result")


class RequestIntake:
    """Knows the tokenizer and the bounds, and keeps nothing between requests but what the log has been told."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        settings: FrontSettings,
        max_context_tokens: Callable[[], int],
        draw_seed: Callable[[], int],
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._planner = RequestPlanner(tokenizer, settings, max_context_tokens, draw_seed)
        self._told_unused: set[str] = set()

    async def read(self, route: str, body: bytes, identity: Callable[[str], ReplyIdentity]) -> PlannedRequest:
        """Returns the request that `body` makes. `route` is COMPLETIONS or CHAT; `identity` gets the prefix of its
        reply ids.

        Raises RequestError leaves.
        """
        if route == COMPLETIONS:
            completion = await self._parse(body, CompletionRequest)
            return await self._planner.plan_completion(completion, identity(completion.id_prefix))
        chat = await self._parse(body, ChatCompletionRequest)
        return await self._planner.plan_chat(chat, identity(chat.id_prefix))

    async def hash(self, route: str, body: bytes) -> str:
        """Returns `body_hash`, computed in a thread where the body is long."""
        return await self._work_on(body, partial(body_hash, route, body))

    async def _parse(self, body: bytes, model: type[Request]) -> Request:
        request = await self._work_on(body, partial(parse_request, body, model))
        for name in request.unused_fields:
            self._tell_unused(name[:MAX_TOLD_CHARACTERS])
        return request

    def _tell_unused(self, name: str) -> None:
        """Logs a name once, and no more names than anybody reads: clients may make up as many as they like."""
        if name not in self._told_unused and len(self._told_unused) < MAX_TOLD_FIELDS:
            self._told_unused.add(name)
            log.info("field_unused", field=name, detail="taken from a request; it changes nothing of the answer here")

    async def _work_on(self, body: bytes, work: Callable[[], Result]) -> Result:
        if len(body) > self._settings.thread_above_characters:
            return await asyncio.to_thread(work)
        return work()


def body_hash(route: str, body: bytes) -> str:
    """Is equal for bodies that say the same: the order of fields and white space do not count."""
    # What is no JSON, or nested too deeply for it, is refused where it is parsed.
    with contextlib.suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return hashlib.sha256(route.encode() + b"\n" + body).hexdigest()
