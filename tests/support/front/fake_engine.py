"""An engine without a mesh: it makes the tokens that a test wrote down, and remembers what was asked and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.router.engine import FinishReason, GenerationRequest, Readiness, Token, TokenStream


@dataclass(frozen=True, slots=True)
class Pause:
    """In a script: nothing comes until the test opens `FakeEngine.gate`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """In a script: the engine raises."""

    error: Exception


Step = int | Pause | Fault


@dataclass
class FakeEngine:
    """Every choice gets the tokens of `script`, cut at `max_tokens`.

    `script_by_choice` counts before `script`. Token ids of the request's `stop_token_ids` end a choice.
    """

    script: Sequence[Step] = ()
    script_by_choice: Mapping[int, Sequence[Step]] = field(default_factory=dict)
    context_tokens: int = 4096
    state: Readiness = field(default_factory=lambda: Readiness(True, "ready"))
    logprob: float = -0.5
    alternatives: tuple[tuple[int, float], ...] = ()
    """Offered as top log-probabilities, cut at the number asked for."""
    drafts: Mapping[int, tuple[bool, int]] = field(default_factory=dict)
    """By the number of a choice's token, from 1 on: whether it was guessed, and how many guesses came to nothing."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[GenerationRequest] = field(default_factory=list)
    resumed: list[GenerationRequest] = field(default_factory=list)
    """Those that a router before has let in, in the order in which they were handed over."""
    cancelled: list[GenerationRequest] = field(default_factory=list)
    """Closed or cancelled before their end."""
    on_cancel: Callable[[], None] = lambda: None
    """Called at each."""
    refusal: Exception | None = None
    """Of every request from now on."""

    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_asked(self, num_requests: int) -> None:
        """Until so many choices were asked for."""
        while len(self.asked) < num_requests:
            self._news.clear()
            await self._news.wait()

    @property
    def max_context_tokens(self) -> int:
        return self.context_tokens

    def readiness(self) -> Readiness:
        return self.state

    def describe_mesh(self) -> dict[str, Any]:
        return {"ready": self.state.ready, "nodes": []}

    def check_room(self, num_choices: int) -> None:
        """There is some, unless the test says what is raised."""
        if self.refusal is not None:
            raise self.refusal

    def generate(self, request: GenerationRequest) -> TokenStream:
        """Goes on in the script after as many tokens as there are, and through no pause before them."""
        if request.is_restored:
            self.resumed.append(request)
        return self._run(request, len(request.generated_token_ids))

    async def _run(self, request: GenerationRequest, num_given: int) -> AsyncGenerator[Token]:
        self.asked.append(request)
        self._news.set()
        complete = False
        try:
            num_tokens = 0
            for step in self.script_by_choice.get(request.choice, self.script):
                if num_tokens < num_given:
                    num_tokens += isinstance(step, int)
                    continue
                if isinstance(step, Pause):
                    await self.gate.wait()
                    continue
                if isinstance(step, Fault):
                    complete = True
                    raise step.error
                num_tokens += 1
                token = self._token(request, step, num_tokens)
                complete = token.finish_reason is not None
                yield token
                if complete:
                    return
                await asyncio.sleep(0)
        finally:
            if not complete:
                self.cancelled.append(request)
                self.on_cancel()

    def _token(self, request: GenerationRequest, token_id: int, num_tokens: int) -> Token:
        sampling = request.sampling
        finish_reason = None
        if token_id in sampling.stop_token_ids:
            finish_reason = FinishReason.STOP
        elif num_tokens == sampling.max_tokens:
            finish_reason = FinishReason.LENGTH
        is_draft, num_rejected = self.drafts.get(num_tokens, (False, 0))
        token = Token(token_id, None, (), finish_reason, is_draft=is_draft, num_rejected_drafts=num_rejected)
        if sampling.num_top_logprobs is None:
            return token
        return replace(token, logprob=self.logprob, top_logprobs=self.alternatives[: sampling.num_top_logprobs])
