"""Other engines with what they have against computing a prefix twice, as their documentation says."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer

from tests.benchmarks.agents.conversations import Traffic
from tests.benchmarks.peers.contenders import AbsentError, Contender, convert_for_llama, set_up
from tests.benchmarks.peers.engines import HttpEngine, llama_engine, vllm_engine

PEERS = ("llama.cpp", "vllm")
CONTEXT_UNIT_TOKENS = 1024


def caching_contender(name: str, checkpoint: Path, peers_dir: Path, traffic: Traffic) -> Contender[HttpEngine]:
    """Sets the peer up, where that is still to be done, to keep all conversations of `traffic`. Raises AbsentError."""
    cores = sorted(os.sched_getaffinity(0))
    context_tokens = (traffic.context_tokens // CONTEXT_UNIT_TOKENS + 1) * CONTEXT_UNIT_TOKENS
    match name:
        case "vllm":
            home, version = set_up(name, peers_dir)
            used = f"{version}, {len(cores)} threads bound to cores, --enable-prefix-caching, 4 GiB of cache"
            return Contender(
                name, True, "bf16", used, lambda: vllm_engine(home, checkpoint, cores, context_tokens, True)
            )
        case "llama.cpp":
            home, version = set_up(name, peers_dir)
            weights = convert_for_llama(home, checkpoint, "bf16")
            streams = traffic.conversations
            fields = {
                "cache_prompt": True,
                "verbose": True,
                "logit_bias": [[token_id, False] for token_id in split_characters(checkpoint)],
            }
            used = (
                f"{version}, llama-server -t {len(cores)} -np {streams}, {context_tokens} tokens a slot, cache_prompt"
            )
            return Contender(
                name,
                True,
                "bf16",
                used,
                lambda: llama_engine(home, weights, len(cores), streams, context_tokens, fields),
            )
    raise AbsentError(f"there is no peer named {name}")


def split_characters(checkpoint: Path) -> list[int]:
    """Returns the ids of tokens that are no whole characters.

    llama-server holds such text back, and then never tells these ids. So it must not draw them: an answer is part of
    the next prompt.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return [
        token_id
        for token_id in range(tokenizer.get_vocab_size())
        if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token_id], skip_special_tokens=False)
    ]
