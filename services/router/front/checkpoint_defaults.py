"""What a checkpoint says about generation: end-of-sequence ids and default sampling, as vLLM reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class CheckpointDefaults:
    """Used where a request leaves a field out."""

    eos_token_ids: frozenset[int]
    """Of generation_config.json and config.json together."""
    vocabulary_size: int | None
    """Rows of the embedding; None if config.json does not say."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_checkpoint_defaults(directory: Path) -> CheckpointDefaults:
    """From `config.json` and `generation_config.json`; a missing file says nothing. Raises CheckpointError.

    `do_sample` is not looked at (vLLM does not either): a client that wants greedy tokens says `temperature` 0.
    """
    config = read_json_object(directory / "config.json")
    text_config = config.get("text_config", config)
    generation = read_json_object(directory / "generation_config.json")
    temperature = generation.get("temperature")
    top_p = generation.get("top_p")
    top_k = generation.get("top_k")
    min_p = generation.get("min_p")
    repetition_penalty = generation.get("repetition_penalty")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise CheckpointError(f"generation_config.json: repetition_penalty is {repetition_penalty}, not above 0")
    return CheckpointDefaults(
        eos_token_ids=frozenset({*_token_ids(generation), *_token_ids(text_config), *_token_ids(config)}),
        vocabulary_size=text_config.get("vocab_size"),
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=0 if top_k is None else max(0, int(top_k)),
        min_p=0.0 if min_p is None else float(min_p),
        repetition_penalty=1.0 if repetition_penalty is None else float(repetition_penalty),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """{} if there is no such file; raises CheckpointError if it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return content


def _token_ids(config: Mapping[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    if value is None:
        return []
    return [int(token_id) for token_id in value] if isinstance(value, list) else [int(value)]
