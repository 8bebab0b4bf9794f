"""Rotary position embedding as `config.json` states it, old form (`rope_theta`, `rope_scaling`) or new (`rope_parameters`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import CheckpointError, UnsupportedModelError

_SUPPORTED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Which frequencies rotate queries and keys. Unused fields keep neutral values.

    Sources: linear (kaiokendev 2023), YaRN (arXiv 2309.00071), llama3 (Llama 3.1 model card).
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    """Multiplies cos and sin (YaRN)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def read_rope_config(raw: Mapping[str, Any], default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """Raises UnsupportedModelError for a kind that is not computed here, CheckpointError for a missing number."""
    parameters: dict[str, Any] = dict(raw.get("rope_scaling") or {})
    parameters.update(raw.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or default_theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _SUPPORTED:
        raise UnsupportedModelError(
            f"config.json: rope type {kind!r} is not supported; supported are {', '.join(_SUPPORTED)}"
        )
    if float(parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor other than 1.0 is not supported")
    if kind == "default":
        return RopeConfig(kind="default", theta=theta)
    factor = _number(parameters, "factor", kind)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor)
    original = int(parameters.get("original_max_position_embeddings") or max_position_embeddings)
    if kind == "llama3":
        return RopeConfig(
            kind="llama3",
            theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=_number(parameters, "low_freq_factor", kind),
            high_freq_factor=_number(parameters, "high_freq_factor", kind),
        )
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_yarn_attention_factor(parameters, factor),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """As the paper suggests, unless the checkpoint states one (YaRN, section 3.4)."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    stated = parameters.get("attention_factor")
    if stated is not None:
        return float(stated)
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scale(float(mscale)) / scale(float(mscale_all_dim))
    return scale(1.0)


def _number(parameters: Mapping[str, Any], key: str, kind: str) -> float:
    value = parameters.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: rope type {kind!r} needs a positive {key}, not {value!r}")
    return float(value)
