"""One choice: tokens of the mesh in, what a client sees out. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.router.engine import FinishReason, GenerationRequest, Token
from services.router.front.text.detokenizer import Vocabulary, create_detokenizer
from services.router.front.text.stop_strings import StopString, StopStringMatcher


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token as log-probabilities show it."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    text: str
    """It is what the token added to this choice's text: "" for every token of a split character except the last, which
    adds it whole. A token that the text does not show (a special one, or one that ends it) is here as written."""
    text_offset: int
    """The characters of this choice's text before the token."""


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """News of one choice: text, its end, or both. Text that is held back comes with a later event."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """Tokens since the last event, whether they show in `text` or not."""
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    num_tokens: int
    """It counts the tokens of the choice so far, these included: how far a client has come once it has this event. An
    end that came without a token counts as one."""
    is_cut: bool = False
    """Its end came without a token."""

    @property
    def num_generated_tokens(self) -> int:
        """Counts the tokens of the choice so far, as usage does."""
        return self.num_tokens - self.is_cut


def merge_events(events: Sequence[ChoiceEvent]) -> ChoiceEvent:
    """Returns all events of one choice as one."""
    return replace(
        events[-1],
        text="".join(event.text for event in events),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=tuple(token for event in events for token in event.logprobs),
    )


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """A choice before it is asked of the mesh."""

    index: int
    """Its place in the reply: prompt by prompt, choice by choice."""
    request: GenerationRequest
    stop_strings: tuple[StopString, ...]
    """All choices of a request have the same objects."""
    echoed_text: str
    """The prompt, if the client wants it in front; else ""."""


class ChoiceStream:
    """Turns the tokens of one choice into events: detokenizer, stop strings and log-probabilities."""

    def __init__(self, planned: PlannedChoice, vocabulary: Vocabulary, *, is_event_each_token: bool = False) -> None:
        """With `is_event_each_token`, for a client that asked for token ids, a token is news also where it makes no
        text."""
        self._index = planned.index
        self._ending_ids = planned.request.sampling.stop_token_ids
        self._min_tokens = planned.request.sampling.min_tokens
        self._vocabulary = vocabulary
        self._detokenizer = create_detokenizer(vocabulary, planned.request.prompt_token_ids)
        self._stop_matcher = StopStringMatcher(planned.stop_strings) if planned.stop_strings else None
        self._is_event_each_token = is_event_each_token
        self._pending_text = planned.echoed_text
        self._pending_token_ids: list[int] = []
        self._pending_logprobs: list[TokenLogprob] = []
        self._num_characters = 0
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, token: Token) -> ChoiceEvent | None:
        """Returns the event that this token makes, if it makes one. There is none after a finish reason."""
        assert self.finish_reason is None
        self.num_tokens += 1
        self._pending_token_ids.append(token.token_id)
        offset = self._num_characters
        text = self._text_of(token)
        self._num_characters += len(text)
        if token.logprob is not None:
            name = text if self._shows(token) else text + self._vocabulary.token_text(token.token_id)
            self._pending_logprobs.append(TokenLogprob(token.token_id, token.logprob, token.top_logprobs, name, offset))
        self._pending_text += self._shown(text, token.finish_reason)
        if self.finish_reason is None and not self._pending_text and not self._is_event_each_token:
            return None
        return self._pop_event(self.num_tokens)

    def cut(self) -> ChoiceEvent:
        """Ends it without another token: returns the text that was held back, and the end. It has no finish reason
        yet."""
        assert self.finish_reason is None
        self._pending_text += self._shown(self._detokenizer.flush(), FinishReason.LENGTH)
        return self._pop_event(self.num_tokens + 1, is_cut=True)

    def _pop_event(self, num_tokens: int, is_cut: bool = False) -> ChoiceEvent:
        event = ChoiceEvent(
            self._index,
            self._pending_text,
            tuple(self._pending_token_ids),
            tuple(self._pending_logprobs),
            self.finish_reason,
            num_tokens,
            is_cut,
        )
        self._pending_text = ""
        self._pending_token_ids.clear()
        self._pending_logprobs.clear()
        return event

    def _text_of(self, token: Token) -> str:
        """Returns what the token adds to the text, with all that was held back if it is the last one."""
        text = self._detokenizer.push(token.token_id) if self._shows(token) else ""
        return text if token.finish_reason is None else text + self._detokenizer.flush()

    def _shows(self, token: Token) -> bool:
        is_ending = token.finish_reason is FinishReason.STOP and token.token_id in self._ending_ids
        return not is_ending and not self._vocabulary.is_skipped(token.token_id)

    def _shown(self, text: str, finish_reason: FinishReason | None) -> str:
        """Returns what may be shown now, and sets the finish reason."""
        matcher = self._stop_matcher
        if matcher is not None:
            text = matcher.push(text, may_stop=self.num_tokens > self._min_tokens)
            if matcher.stopped:
                self.finish_reason = FinishReason.STOP
                return text
            if finish_reason is not None:
                text += matcher.flush()
        self.finish_reason = finish_reason
        return text
