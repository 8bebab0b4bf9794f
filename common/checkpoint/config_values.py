"""Values of a `config.json`, checked one by one: what is not as it must be is refused by its key. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError

_SHOWN_CHARACTERS = 100
_MAX_LAYERS = 1 << 16
_MAX_SIZE = (1 << 31) - 1
"""No model comes near; a damaged number must not fill the memory."""


def shown(value: object) -> str:
    """Returns a value as a refusal shows it: what is damaged may be very long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def whole_number(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Returns a size. null counts as absent, as transformers writes it; raises CheckpointError where there is no
    default."""
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a whole number of at least 1, not {shown(value)}")
    most = _MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE
    if value > most:
        raise CheckpointError(f"config.json: {key} must be at most {most}, not {shown(value)}")
    return value


def flag(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Raises CheckpointError for what is neither true, false nor null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false, not {shown(value)}")
    return default if value is None else value


def items(raw: Mapping[str, Any], key: str) -> list[Any]:
    """Returns the items of a list; none where it is absent. Raises CheckpointError for what is not a list."""
    value = raw.get(key)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"config.json: {key} must be a list, not {shown(value)}")
    return value or []
