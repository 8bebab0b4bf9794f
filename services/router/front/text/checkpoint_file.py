"""A JSON file of a checkpoint, read value by value, and what such files say about generation.

What is not as it must be is refused by file, key and what would be right, as a field of a request is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.checkpoint.config_values import shown
from common.checkpoint.directory import read_json
from common.errors import CheckpointError
from services.router.front.schema.openai_schema import GenerationFields

_SAMPLING_DEFAULTS = {
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0 and at most 1",
    "top_k": "a whole number from -1 on",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number above 0",
}
"""Keys of generation_config.json that stand for fields of a request, with the values that are right for both."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "top_h": (1,),
    "typical_p": (1,),
}
"""Keys of generation_config.json that change an answer of transformers and none of this server's, nor of vLLM's, with
the values that change nothing there; null is one of them each time."""


class CheckpointFile:
    """Reads an object of the file, or one inside it. A null counts as absent everywhere, as transformers writes it."""

    def __init__(self, name: str, values: Mapping[str, Any], path: str = "") -> None:
        """`path` is that of this object in the file, "" for the file's own."""
        self.name = name
        self.path = path
        self.values = values

    @classmethod
    def read(cls, directory: Path, name: str) -> CheckpointFile:
        """Reads the file; it is empty if there is none. Raises CheckpointError if it is not a JSON object."""
        path = directory / name
        return cls(name, read_json(path) if path.is_file() else {})

    def refuse(self, key: str, right: str) -> NoReturn:
        """Raises CheckpointError; `right` says what the value of `key` must be."""
        raise CheckpointError(f"{self.name}: {self.path}{key} must be {right}, not {shown(self.values.get(key))}")

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value is True

    def text(self, key: str) -> str:
        """Returns a string that must be there."""
        value = self.values.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def section(self, key: str) -> CheckpointFile | None:
        """Returns an object inside this one."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "an object or null")
        return CheckpointFile(self.name, value, f"{self.path}{key}.")

    def items(self, key: str) -> list[CheckpointFile]:
        """Returns each entry of a list as an object with the one key `[number]`, so that what is wrong with it can be
        named."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(key, "a list or null")
        return [CheckpointFile(self.name, {f"[{at}]": item}, f"{self.path}{key}") for at, item in enumerate(value)]

    def size(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 1 <= value < 1 << 31):
            self.refuse(key, "a whole number from 1 to 2147483647")
        return value

    def token_ids(self, key: str) -> list[int]:
        """Reads one id or a list of them."""
        value = self.values.get(key)
        if value is None:
            return []
        token_ids = value if isinstance(value, list) else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
            self.refuse(key, "a token id (a whole number from 0), a list of them or null")
        return token_ids


@dataclass(frozen=True, slots=True)
class CheckpointDefaults:
    """What is used where a request leaves a field out."""

    eos_token_ids: frozenset[int]
    """Those of generation_config.json, config.json and the tokenizer's `eos_token` together."""
    vocabulary_size: int | None
    """Rows of the embedding; None if config.json does not say."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    not_applied: tuple[str, ...] = ()
    """Keys of generation_config.json that would change an answer of transformers, and change none here."""


def read_checkpoint_defaults(directory: Path, tokenizer_eos_ids: Iterable[int] = ()) -> CheckpointDefaults:
    """Reads `config.json` and `generation_config.json`; a missing file says nothing.

    `do_sample` is not looked at (vLLM does not either): a client that wants greedy tokens says `temperature` 0. Raises
    CheckpointError that names file, key and what would be right.
    """
    config = CheckpointFile.read(directory, "config.json")
    generation = CheckpointFile.read(directory, "generation_config.json")
    stated = {key: _sampling_default(generation, key) for key in _SAMPLING_DEFAULTS}
    given = {key: value for key, value in stated.items() if value is not None}
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])
    ends = (part.token_ids("eos_token_id") for part in (generation, config))
    return CheckpointDefaults(
        eos_token_ids=frozenset(tokenizer_eos_ids).union(*ends),
        vocabulary_size=config.size("vocab_size"),
        not_applied=tuple(key for key, neutral in _NEUTRAL.items() if _changes_answers(generation, key, neutral)),
        **given,
    )


def _changes_answers(generation: CheckpointFile, key: str, neutral: tuple[Any, ...]) -> bool:
    value = generation.values.get(key)
    return value is not None and value not in neutral


def _sampling_default(generation: CheckpointFile, key: str) -> Any:
    """Checks the value by the rule of the request's field."""
    field = TypeAdapter(
        GenerationFields.model_fields[key].rebuild_annotation(), config=ConfigDict(strict=True, allow_inf_nan=False)
    )
    try:
        return field.validate_python(generation.values.get(key))
    except ValidationError:
        generation.refuse(key, _SAMPLING_DEFAULTS[key])
