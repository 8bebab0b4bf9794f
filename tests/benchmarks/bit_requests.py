"""The requests whose answers `same_bits` hashes: every way to sample, at prompts short and long. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUM_REQUESTS = 64
SMALLEST_VOCABULARY = 400
"""Prompts take ids that every model here has; the first few are special tokens."""
FIRST_PLAIN_TOKEN_ID = 3
WORDS = "a mesh serves one model and each stage holds a range of layers where experts answer whoever asks them".split()

PROMPT_TOKENS = (1, 31, 255, 7, 2, 32, 256, 100, 3, 33, 257, 300, 16, 64, 511, 600)
"""Around the ends of KV blocks (32) and of prefill chunks (256)."""
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "greedy past the end": {"ignore_eos": True},
    "repetition penalty": {"repetition_penalty": 1.3, "ignore_eos": True},
    "biases": {"logit_bias": {"17": 6.5, "40": -100, "301": 3.25, "399": 2}},
    "sampled": {"temperature": 1.0},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "top_k, top_p and min_p": {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "all penalties": {
        "temperature": 0.9,
        "presence_penalty": 0.7,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.15,
        "logit_bias": {"20": 1.5},
    },
    "min_tokens": {"temperature": 1.0, "min_tokens": 20, "stop_token_ids": list(range(3, 400, 7))},
    "stop strings": {"temperature": 1.0, "stop": ["e", " th", "ou"]},
    "three choices": {"temperature": 1.0, "top_k": 100, "n": 3},
    "echo": {"temperature": 0.7, "echo": True},
    "two prompts": {"temperature": 1.1, "top_p": 0.9},
    "chat": {"temperature": 0.6, "top_p": 0.95},
}
TOP_LOGPROBS = (5, 5, 0, 20)
"""By round; in the second one answers are streamed, and in the last one prompts are text."""


@dataclass(frozen=True)
class BitRequest:
    """One request of the set."""

    name: str
    path: str
    body: dict[str, Any]
    """Without the model's name."""


def bit_requests() -> list[BitRequest]:
    """Returns the same 64 requests every time."""
    source = random.Random(14)
    found: list[BitRequest] = []
    for round_number, num_top in enumerate(TOP_LOGPROBS):
        for place, kind in enumerate(FIELDS):
            num_tokens = PROMPT_TOKENS[(place + 4 * round_number) % len(PROMPT_TOKENS)]
            common = {"temperature": 0, "max_tokens": 24 + 8 * round_number, "return_token_ids": True}
            body = {**common, **FIELDS[kind]}
            if body["temperature"]:
                body["seed"] = 1000 * round_number + place
            if round_number == 1:
                body["stream"] = True
            name = f"{len(found):02d} {kind}, {num_tokens} tokens{', streamed' if 'stream' in body else ''}"
            is_text = round_number == len(TOP_LOGPROBS) - 1
            found.append(BitRequest(name, *_with_prompt(kind, body, num_tokens, num_top, is_text, source)))
    return found


def _with_prompt(
    kind: str, body: dict[str, Any], num_tokens: int, num_top: int, is_text: bool, source: random.Random
) -> tuple[str, dict[str, Any]]:
    """Returns the path and the body with what is asked."""
    words = " ".join(source.choice(WORDS) for _ in range(max(1, num_tokens // 2)))
    if kind == "chat":
        messages = [{"role": "user", "content": words}]
        return "/v1/chat/completions", body | {"messages": messages, "logprobs": True, "top_logprobs": num_top}
    token_ids = [source.randrange(FIRST_PLAIN_TOKEN_ID, SMALLEST_VOCABULARY) for _ in range(num_tokens)]
    prompt: Any = words if is_text else token_ids
    if kind == "two prompts":
        prompt = [prompt, "one more" if is_text else token_ids[::-1]]
    # The server does not give both.
    asked = {} if kind == "echo" else {"logprobs": num_top}
    return "/v1/completions", body | {"prompt": prompt} | asked
