"""What a router serves: the checkpoint that MODEL names, read and checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint.directory import (
    find_weight_files,
    read_tensor_index,
    resolve_model,
    served_name,
    tensors_in_several_files,
)
from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.part import refuse_useless_part, see_checkpoint
from common.checkpoint.tensor_names import EMBEDDING, LM_HEAD, check_tensors, unused_tensors
from common.config import Settings

_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True)
class Model:
    """What is served."""

    directory: Path
    config: ModelConfig
    fingerprint: str
    dtype: str
    context_tokens: int
    served_name: str
    remarks: tuple[str, ...] = ()
    """What an operator would want to know of the checkpoint: what lies there and is not read, what contradicts."""


def read_model(settings: Settings) -> Model:
    """Returns the model that the settings name. Raises ConfigurationError or CheckpointError with a sentence."""
    directory = resolve_model(settings.model)
    config = read_model_config(directory)
    seen = see_checkpoint(directory, config)
    refuse_useless_part(seen.part, None, settings.model)
    remarks = _check_weights(directory, config) if seen.part is None else ()
    stored = "bfloat16" if config.dtype == "float16" else config.dtype
    return Model(
        directory=directory,
        config=config,
        fingerprint=seen.fingerprint,
        dtype=stored if settings.dtype == "auto" else settings.dtype,
        context_tokens=min(settings.max_context_tokens or config.context_tokens, config.context_tokens),
        served_name=settings.served_name or seen.model or served_name(settings.model, directory),
        remarks=remarks,
    )


def _check_weights(directory: Path, config: ModelConfig) -> tuple[str, ...]:
    """Raises CheckpointError for weights that cannot be what config.json says; what they hold besides is remarked."""
    index = read_tensor_index(directory)
    check_tensors(config, index)
    remarks: list[str] = []
    if passed_over := find_weight_files(directory).passed_over:
        remarks.append(f"beside the weights lie files that are not read: {_some_of(passed_over)}")
    if doubled := tensors_in_several_files(directory):
        remarks.append(f"tensors are stored in several files, and are read from the last: {_some_of(doubled)}")
    if unused := unused_tensors(config, index):
        remarks.append(f"tensors that the model does not have are not read: {_some_of(unused)}")
    if config.tie_word_embeddings and EMBEDDING in index and LM_HEAD in index:
        remarks.append(f"config.json: tie_word_embeddings is true, and {LM_HEAD} is stored: that tensor is used")
    return tuple(remarks)


def _some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (
        f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    )
