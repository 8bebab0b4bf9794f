"""What the clients of a run ask is drawn from its seed: the same seed asks the same."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WORDS = (
    "mesh stage expert router token layer cache block copy shard slot step stream request answer process socket "
    "message queue weight gate model prompt journal mirror replay a the of to and from with when where nobody waits "
    "loses keeps moves sends takes gives hears one two three many old new late early whole broken"
).split()
STOP_PAIRS = ("qz", "xj", "zq", "th", "he", "er")


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What drawn requests may be. Fractions are shares of all requests, in [0, 1]."""

    max_tokens: int
    prompt_words: tuple[int, int]
    """Fewest and most words of a prompt."""
    greedy: float
    stop: float
    two_choices: float
    penalties: float


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """One completion to ask for, and to ask for again."""

    name: str
    kind: str
    fields: dict[str, Any]
    """Of the body, without the model's name."""

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


def draw_requests(seed: int, count: int, shape: RequestShape, with_penalties: bool) -> list[ChaosRequest]:
    """Draws `count` requests. Without penalties, which a server may refuse, all else stays the same."""
    return [_draw(seed, number, shape, with_penalties) for number in range(count)]


def _draw(seed: int, number: int, shape: RequestShape, with_penalties: bool) -> ChaosRequest:
    draw = random.Random(f"{seed}/request/{number}")
    num_words = draw.randint(*shape.prompt_words)
    fields: dict[str, Any] = {
        # The number in front keeps the prompts apart from the first block on.
        "prompt": f"{number} " + " ".join(draw.choice(WORDS) for _ in range(num_words)),
        "max_tokens": shape.max_tokens,
        "ignore_eos": True,
    }
    labels = []
    request_seed = draw.randrange(2**31)
    if draw.random() < shape.greedy:
        labels.append("greedy")
        fields["temperature"] = 0.0
    else:
        labels.append("seeded")
        fields |= {"temperature": 1.0, "seed": request_seed}
    stop = draw.sample(STOP_PAIRS, 2)
    if draw.random() < shape.stop:
        labels.append("stop")
        fields["stop"] = stop
    if draw.random() < shape.two_choices and "seed" in fields:
        labels.append("n=2")
        fields["n"] = 2
    penalties = {"presence_penalty": round(draw.uniform(0.1, 1.0), 2), "frequency_penalty": 0.2}
    if draw.random() < shape.penalties and with_penalties:
        labels.append("penalties")
        fields |= penalties
    return ChaosRequest(f"request-{number}", ", ".join(labels), fields)


def requests_sha256(requests: Sequence[ChaosRequest], model: str) -> str:
    """Returns the hash of all that is asked: a reference belongs to it."""
    return hashlib.sha256("".join(request.body_sha256(model) for request in requests).encode()).hexdigest()
