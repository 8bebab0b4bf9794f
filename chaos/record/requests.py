"""What the clients of a run ask is drawn from its seed: the same seed asks the same."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from chaos.suite_fields import AtLeastOne, Positive, Section, Share

WORDS = (
    "mesh stage expert router token layer cache block copy shard slot step stream request answer process socket "
    "message queue weight gate model prompt journal mirror replay a the of to and from with when where nobody waits "
    "loses keeps moves sends takes gives hears one two three many old new late early whole broken"
).split()
SALTED = "salted"
REPEATED = {"65": 12.0, "66": 11.0, "67": 10.0}
"""What is added to the logits of these tokens where an answer is to repeat itself; every vocabulary has them."""
STOP_PAIRS = ("qz", "xj", "zq", "th", "he", "er")


class SuiteLoad(Section):
    """Streaming clients, each of which asks one request after another until the timeline has ended.

    Kinds of requests are given by their shares of all requests.
    """

    streams: Annotated[int, Field(ge=1, le=1024)] = 16
    requests: Annotated[int, Field(ge=1, le=4096)] = 16
    """The number of different requests, which the clients ask in turn."""
    max_tokens: AtLeastOne = 512
    prompt_words: tuple[AtLeastOne, AtLeastOne] = (8, 48)
    """Fewest and most words of a prompt."""
    greedy: Share = 0.5
    stop: Share = 0.2
    two_choices: Share = 0.2
    penalties: Share = 0.2
    alike: Share = 0.0
    """Prompts that begin with the same text: what is found in a cache must be what would be computed."""
    alike_words: AtLeastOne = 64
    """Words of that text."""
    salted: Share = 0.0
    """Requests with one choice that have a salt of their own each time: nothing may be found in a cache for them."""
    repeating: Share = 0.0
    """Answers of few different tokens, which repeat themselves: tokens are guessed ahead, right and wrong ones."""
    resumable: bool = True
    """Clients ask for streams that they can re-attach to."""
    reattach_within_s: Positive = 60.0
    """After a break, the stream must go on within it; so must a busy or absent server accept a request."""
    request_deadline_s: Positive = 300.0
    """A client that has neither an end nor an error by then gives up, and the request counts as hung."""

    @model_validator(mode="after")
    def _words_in_order(self) -> Self:
        if self.prompt_words[0] > self.prompt_words[1]:
            raise ValueError("prompt_words: the first is the fewest, the second the most")
        return self


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """One completion to ask for, and to ask for again."""

    name: str
    kind: str
    fields: dict[str, Any]
    """The fields of the body, without the model's name."""
    is_salted: bool = False
    """It is asked with a salt of its own, each time anew."""

    def body(self, model: str) -> dict[str, Any]:
        """Returns the body of POST /v1/completions, streamed, with token ids and log-probabilities."""
        return {
            "model": model,
            **self.fields,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "logprobs": 0,
        }

    def body_sha256(self, model: str) -> str:
        """Returns the hash of the body with sorted keys."""
        return hashlib.sha256(json.dumps(self.body(model), sort_keys=True).encode()).hexdigest()

    @property
    def num_choices(self) -> int:
        return int(self.fields.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.fields["max_tokens"])


def draw_requests(seed: int, load: SuiteLoad, with_penalties: bool) -> list[ChaosRequest]:
    """Draws all requests. Without penalties, which a server may refuse, all else stays the same."""
    return [_draw(seed, number, load, with_penalties) for number in range(load.requests)]


def _draw(seed: int, number: int, load: SuiteLoad, with_penalties: bool) -> ChaosRequest:
    draw = random.Random(f"{seed}/request/{number}")
    num_words = draw.randint(*load.prompt_words)
    fields: dict[str, Any] = {
        # The number in front keeps the prompts apart from the first block on.
        "prompt": f"{number} " + " ".join(draw.choice(WORDS) for _ in range(num_words)),
        "max_tokens": load.max_tokens,
        "ignore_eos": True,
    }
    labels = []
    request_seed = draw.randrange(2**31)
    if draw.random() < load.greedy:
        labels.append("greedy")
        fields["temperature"] = 0.0
    else:
        labels.append("seeded")
        fields |= {"temperature": 1.0, "seed": request_seed}
    stop = draw.sample(STOP_PAIRS, 2)
    if draw.random() < load.stop:
        labels.append("stop")
        fields["stop"] = stop
    if draw.random() < load.two_choices and "seed" in fields:
        labels.append("n=2")
        fields["n"] = 2
    penalties = {"presence_penalty": round(draw.uniform(0.1, 1.0), 2), "frequency_penalty": 0.2}
    if draw.random() < load.penalties and with_penalties:
        labels.append("penalties")
        fields |= penalties
    also = random.Random(f"{seed}/cache/{number}")  # apart: what is drawn above stays the same without these
    if also.random() < load.alike:
        labels.append("alike")
        words = random.Random(f"{seed}/alike")
        common = " ".join(words.choice(WORDS) for _ in range(load.alike_words))
        fields["prompt"] = f"{common} {fields['prompt']}"
    is_salted = also.random() < load.salted and "n" not in fields
    if random.Random(f"{seed}/drafts/{number}").random() < load.repeating:
        labels.append("repeating")
        fields["logit_bias"] = REPEATED
    labels += [SALTED] * is_salted
    return ChaosRequest(f"request-{number}", ", ".join(labels), fields, is_salted)


def requests_sha256(requests: Sequence[ChaosRequest], model: str) -> str:
    """Returns the hash of all that is asked: a reference belongs to it."""
    return hashlib.sha256("".join(request.body_sha256(model) for request in requests).encode()).hexdigest()
