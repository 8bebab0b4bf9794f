"""Turns a body into choices: checked, tokenized, bounded by the context, every default filled in."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

import structlog

from common.errors import ContextLengthError, InvalidRequestError, UnknownModelError
from common.ids import RequestId
from services.router.engine import GenerationRequest, SamplingParameters
from services.router.front.schema.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
    Request,
    parse_object,
    parse_request,
)
from services.router.front.settings import FrontSettings
from services.router.front.text.choice_stream import PlannedChoice
from services.router.front.text.stop_strings import StopString
from services.router.front.text.tokenizer import TextTokenizer

log = structlog.get_logger(__name__)

COMPLETIONS, CHAT = CompletionRequest.route, ChatCompletionRequest.route
MAX_TOLD_FIELDS, MAX_TOLD_CHARACTERS = 200, 100
DEFAULT_COMPLETION_TOKENS = 16
_LONG_CHARACTERS = 1 << 18
_SEED_MASK = 2**63 - 1
_MAX_VOCABULARY_SIZE = 2**31
"""No vocabulary has more; a JSON number may be larger than any that a step carries."""
_MAX_TOP_K = _MAX_VOCABULARY_SIZE - 1
"""It asks for all of any vocabulary."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ReplyIdentity:
    """What is drawn once for a request, and must be the same when it is planned again."""

    reply_id: str
    created_s: int
    """It stands in the reply, and is the date that a chat template sees."""
    seed: int
    """It counts where the client gives none."""
    is_new: bool = True
    """The request is not accepted yet; one that was is not refused for what has changed since."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One HTTP request, ready to run: what it asks of the mesh, and what its reply looks like."""

    fields: CompletionRequest | ChatCompletionRequest
    identity: ReplyIdentity
    system_fingerprint: str | None
    choices: tuple[PlannedChoice, ...]
    """They come prompt by prompt, and for each prompt `n` of them."""
    misfit: ContextLengthError | None = None
    """Why it does not fit, if it was accepted when the context was larger."""

    @property
    def seed(self) -> int:
        """Returns the seed of all its choices."""
        return self.choices[0].request.sampling.seed

    @property
    def num_prompt_tokens(self) -> int:
        """Counts each prompt once, whatever `n` is."""
        return sum(len(choice.request.prompt_token_ids) for choice in self.choices if choice.request.choice == 0)


class _Room:
    """Bounds one request by the context. A new one that does not fit is refused; an accepted one keeps its `misfit`."""

    def __init__(self, context_tokens: int, parameter: str, max_tokens: int, *, is_new: bool) -> None:
        self._context_tokens = context_tokens
        self._parameter = parameter
        self._max_tokens = max_tokens
        self._is_new = is_new
        self.misfit: ContextLengthError | None = None

    def check(self, num_tokens: int, is_least: bool = False) -> None:
        """Checks that a prompt of this many tokens fits; with `is_least` it may have more."""
        if num_tokens + self._max_tokens <= self._context_tokens:
            return
        shown = f"at least {num_tokens}" if is_least else str(num_tokens)
        self.misfit = ContextLengthError(
            f"this model's context holds {self._context_tokens} tokens; the prompt has {shown} and {self._max_tokens} "
            "were asked for",
            self._parameter,
        )
        if self._is_new:
            raise self.misfit


class RequestPlanner:
    """Knows the tokenizer and the bounds, and keeps nothing between requests but what the log has been told."""

    def __init__(
        self, tokenizer: TextTokenizer, settings: FrontSettings, max_context_tokens: Callable[[], int]
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._max_context_tokens = max_context_tokens
        self._told_unused: set[str] = set()
        # One at a time, also if its client has gone meanwhile: 8 MB of text take 2 GB.
        self._long_texts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long-text")

    async def read(self, route: str, body: bytes, identity: ReplyIdentity) -> PlannedRequest:
        """Returns the request that `body` makes; `route` is COMPLETIONS or CHAT. Raises RequestError leaves."""
        if route == COMPLETIONS:
            return await self.plan_completion(await self._parse(body, CompletionRequest), identity)
        return await self.plan_chat(await self._parse(body, ChatCompletionRequest), identity)

    async def hash(self, route: str, body: bytes) -> str:
        """Returns `body_hash`, computed in a thread where the body is long."""
        return await self._work_on(len(body), partial(body_hash, route, body))

    async def add_salt(self, body: bytes, salt: str | None) -> bytes:
        """Returns `with_salt`, made in a thread where the body is long; without a salt the body. Raises
        InvalidRequestError."""
        if salt is None:
            return body
        return await self._work_on(len(body), partial(with_salt, body, salt))

    async def plan_completion(self, request: CompletionRequest, identity: ReplyIdentity) -> PlannedRequest:
        """Returns the planned request. Raises RequestError leaves.

        One that is not new was accepted before, so neither another name of the model nor a smaller context refuses it
        now; what is too long is a `misfit`.
        """
        self._check(request, len(request.prompts), identity.is_new)
        max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        room = _Room(self._max_context_tokens(), "prompt", max_tokens, is_new=identity.is_new)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                room.check(self.tokenizer.bound.least_tokens(prompt), is_least=True)
        add_special_tokens = request.add_special_tokens is not False
        prompts: list[list[int]] = []
        for prompt in request.prompts:
            prompts.append(await self._encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt)
            self._check_prompt(prompts[-1], "prompt", room)
        echoed = [self._echo(prompt) for prompt in request.prompts] if request.echo else [""] * len(prompts)
        return self._plan(request, identity, prompts, echoed, max_tokens, room.misfit)

    async def plan_chat(self, request: ChatCompletionRequest, identity: ReplyIdentity) -> PlannedRequest:
        """Returns the planned chat, under the same rules."""
        self._check(request, 1, identity.is_new)
        messages = [message.for_template() for message in request.messages]
        arguments = request.chat_template_kwargs or {}
        if request.reasoning_effort is not None:
            arguments = {"reasoning_effort": request.reasoning_effort, **arguments}
        now = datetime.fromtimestamp(identity.created_s)
        render = partial(self.tokenizer.render_chat, messages, arguments, now)
        text = await self._work_on(len(str(messages)) + len(str(arguments)), render)
        max_tokens = request.max_completion_tokens or request.max_tokens
        room = _Room(self._max_context_tokens(), "messages", max_tokens or 1, is_new=identity.is_new)
        room.check(self.tokenizer.bound.least_tokens(text), is_least=True)
        prompt = await self._encode(text, add_special_tokens=False)
        self._check_prompt(prompt, "messages", room)
        if max_tokens is None:
            max_tokens = max(0, self._max_context_tokens() - len(prompt))
        return self._plan(request, identity, [prompt], [""], max_tokens, room.misfit)

    async def _parse(self, body: bytes, model: type[Request]) -> Request:
        request = await self._work_on(len(body), partial(parse_request, body, model))
        for name in request.unused_fields:
            self._tell_unused(name[:MAX_TOLD_CHARACTERS])
        return request

    def _tell_unused(self, name: str) -> None:
        """Logs a name once, and no more names than people read: clients may make up as many as they like."""
        if name not in self._told_unused and len(self._told_unused) < MAX_TOLD_FIELDS:
            self._told_unused.add(name)
            log.info(
                "field_unused", field=name, detail="a request has this field, which changes nothing of its answer here"
            )

    async def _work_on(self, num_characters: int, work: Callable[[], Result]) -> Result:
        """Does the work, in a thread where it is long."""
        if num_characters > self._settings.thread_above_characters:
            return await asyncio.to_thread(work)
        return work()

    def _check(self, request: GenerationFields, num_prompts: int, is_new: bool) -> None:
        if is_new and request.model != self._settings.served_name:
            raise UnknownModelError(
                f"the model `{request.model}` is not available; this server serves `{self._settings.served_name}`",
                "model",
            )
        if num_prompts == 0:
            raise InvalidRequestError("`prompt`: must hold at least one prompt", "prompt")
        if num_prompts * request.num_choices > self._settings.max_sequences:
            raise InvalidRequestError(
                f"`prompt`: prompts times `n` must be at most {self._settings.max_sequences}", "prompt"
            )

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= self._settings.thread_above_characters:
            return self.tokenizer.encode(text, add_special_tokens)
        threads = self._long_texts if len(text) > _LONG_CHARACTERS else None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, self.tokenizer.encode, text, add_special_tokens)

    def _check_prompt(self, token_ids: Sequence[int], parameter: str, room: _Room) -> None:
        if not token_ids:
            raise InvalidRequestError(
                f"`{parameter}`: has no tokens after tokenization; at least one is needed", parameter
            )
        room.check(len(token_ids))
        vocabulary_size = self.tokenizer.defaults.vocabulary_size
        if vocabulary_size is not None and max(token_ids) >= vocabulary_size:
            raise InvalidRequestError(
                f"`{parameter}`: token id {max(token_ids)} is outside the model's vocabulary of {vocabulary_size}",
                parameter,
            )

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.echo(prompt)

    def _plan(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        identity: ReplyIdentity,
        prompts: Sequence[Sequence[int]],
        echoed: Sequence[str],
        max_tokens: int,
        misfit: ContextLengthError | None,
    ) -> PlannedRequest:
        # One seed for all: choices differ by their number, and a prompt's result not by the prompts around it.
        seed = (identity.seed if request.seed is None else request.seed) & _SEED_MASK
        min_tokens = request.min_tokens or 0
        if identity.is_new and min_tokens > max_tokens:
            raise InvalidRequestError(
                f"`min_tokens`: {min_tokens} is more than the {max_tokens} tokens allowed", "min_tokens"
            )
        sampling = self._sampling(request, seed, max_tokens)
        stop_strings = tuple(map(StopString, request.stop_strings))
        choices: list[PlannedChoice] = []
        for prompt, echoed_text in zip(prompts, echoed, strict=True):
            token_ids = tuple(prompt)
            for choice in range(request.num_choices):
                index = len(choices)
                request_id = RequestId(f"{identity.reply_id}-{index}")
                generation = GenerationRequest(
                    request_id,
                    token_ids,
                    sampling,
                    choice,
                    identity.reply_id,
                    cache_salt=request.cache_salt or "",
                    uses_cache=request.cache != "off",
                    uses_drafts=request.drafts != "off",
                )
                choices.append(PlannedChoice(index, generation, stop_strings, echoed_text))
        return PlannedRequest(request, identity, self._settings.system_fingerprint, tuple(choices), misfit)

    def _sampling(
        self, request: CompletionRequest | ChatCompletionRequest, seed: int, max_tokens: int
    ) -> SamplingParameters:
        defaults = self.tokenizer.defaults
        ending_ids = frozenset() if request.ignore_eos else defaults.eos_token_ids
        # Special tokens do not show in the text, so a stop string that names one stands for the token.
        named_ids = map(self.tokenizer.vocabulary.special_id, request.stop_strings)
        ending_ids = ending_ids.union(token_id for token_id in named_ids if token_id is not None)
        top_k = defaults.top_k if request.top_k is None else request.top_k
        return SamplingParameters(
            max_tokens=max_tokens,
            temperature=_given(request.temperature, defaults.temperature),
            top_p=_given(request.top_p, defaults.top_p),
            top_k=min(max(0, top_k), _MAX_TOP_K),
            seed=seed,
            num_top_logprobs=request.num_top_logprobs,
            stop_token_ids=self._known(ending_ids.union(request.stop_token_ids or ())),
            min_p=_given(request.min_p, defaults.min_p),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
            logit_bias=self._logit_bias(request),
            min_tokens=request.min_tokens or 0,
        )

    def _known(self, token_ids: frozenset[int]) -> frozenset[int]:
        """Leaves out ids that are never drawn: some clients send a list that fits several models."""
        size = self.tokenizer.defaults.vocabulary_size or _MAX_VOCABULARY_SIZE
        return frozenset(token_id for token_id in token_ids if token_id < size)

    def _logit_bias(self, request: GenerationFields) -> tuple[tuple[int, float], ...]:
        biases = tuple(sorted((int(token_id), bias) for token_id, bias in (request.logit_bias or {}).items()))
        vocabulary_size = self.tokenizer.defaults.vocabulary_size
        if biases and vocabulary_size is not None and biases[-1][0] >= vocabulary_size:
            raise InvalidRequestError(
                f"`logit_bias`: token id {biases[-1][0]} is outside the model's vocabulary of {vocabulary_size}",
                "logit_bias",
            )
        return biases


def with_salt(body: bytes, salt: str) -> bytes:
    """Returns the body with the salt that the header says, so that all that is made of it later, after a restart too,
    has it; nothing else of it changes. Raises InvalidRequestError if it says another one, or is no JSON object."""
    fields = parse_object(body)
    if fields.get("cache_salt") not in (None, salt):
        raise InvalidRequestError("Moemesh-Cache-Salt and `cache_salt` say different things; give one", "cache_salt")
    # Of two fields with one name the last counts, and null may stand there already.
    comma = b"," if fields else b""
    return body.rstrip()[:-1] + comma + b'"cache_salt":' + json.dumps(salt).encode() + b"}"


def body_hash(route: str, body: bytes) -> str:
    """Returns a hash that is equal for bodies that say the same: the order of fields and white space do not count."""
    # What is not JSON, or nested too deeply for it, is refused where it is parsed.
    with contextlib.suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return hashlib.sha256(route.encode() + b"\n" + body).hexdigest()


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
