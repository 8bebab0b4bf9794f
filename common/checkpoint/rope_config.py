"""Rotary position embedding as `config.json` states it: `rope_theta` and `rope_scaling`, or newer `rope_parameters`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from common.checkpoint.config_values import flag, shown
from common.errors import CheckpointError, UnsupportedModelError

_SUPPORTED = ("default", "linear", "llama3", "yarn")
_MAX_POSITIONS = (1 << 31) - 1
_MIN_RATE, _MAX_RATE = 1e-6, 1e6
"""What scales frequencies lies far within; beyond this a config is damaged, and its table would hold no numbers."""
_MAX_FACTOR = 65_536.0
"""Published factors go up to 160; beyond this a config is damaged, and its context would fill the memory."""


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

    def context_tokens(self, max_position_embeddings: int) -> int:
        """Positions that the scaled frequencies are made for, never fewer than the config states.

        YaRN states what the model was trained on and a factor; linear interpolation stretches the stated maximum; the
        maximum of a llama3 config is that of the scaled model already.
        """
        scaled = {
            "linear": max_position_embeddings * self.factor,
            "yarn": self.original_max_position_embeddings * self.factor,
        }.get(self.kind, 0)
        return max(max_position_embeddings, int(scaled))


def read_rope_config(raw: Mapping[str, Any], default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """Raises UnsupportedModelError for a kind that is not computed here, CheckpointError for a number that is missing
    or makes no sense."""
    config = _read(raw, default_theta, max_position_embeddings)
    if config.theta <= 1:
        raise CheckpointError(f"config.json: rope_theta must be a number above 1, not {config.theta}")
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        if not _MIN_RATE <= getattr(config, name) <= _MAX_RATE:
            raise CheckpointError(
                f"config.json: {name} of rope type {config.kind!r} must be from {_MIN_RATE:g} to {_MAX_RATE:g}, "
                f"not {getattr(config, name)}"
            )
    return config


def _read(raw: Mapping[str, Any], default_theta: float, max_position_embeddings: int) -> RopeConfig:
    parameters = _parameters(raw)
    theta = _positive(parameters, "rope_theta", _positive(raw, "rope_theta", default_theta))
    named = (parameters.get("rope_type"), parameters.get("type"), "default")
    kind = next(name for name in named if name is not None)
    if kind not in _SUPPORTED:
        raise UnsupportedModelError(
            f"config.json: rope type {shown(kind)} is not supported; supported are {', '.join(_SUPPORTED)}"
        )
    if _positive(parameters, "partial_rotary_factor", _positive(raw, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor other than 1.0 is not supported")
    if kind == "default":
        return RopeConfig(kind="default", theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=_factor(parameters, kind))
    original = _original_positions(raw, parameters, max_position_embeddings)
    if kind == "llama3":
        return RopeConfig(
            kind="llama3",
            theta=theta,
            factor=_factor(parameters, kind),
            original_max_position_embeddings=original,
            low_freq_factor=_number(parameters, "low_freq_factor", kind),
            high_freq_factor=_number(parameters, "high_freq_factor", kind),
        )
    is_implied = "factor" in parameters and parameters["factor"] is None  # null: as transformers has it
    factor = max_position_embeddings / original if is_implied else _factor(parameters, kind)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_yarn_attention_factor(parameters, factor),
        beta_fast=_positive(parameters, "beta_fast", 32.0),
        beta_slow=_positive(parameters, "beta_slow", 1.0),
        truncate=flag(parameters, "truncate", default=True),
    )


def _original_positions(raw: Mapping[str, Any], parameters: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Returns how many the model was trained on; stated beside the rope parameters it counts more than among them, as
    transformers has it."""
    stated = _positive(parameters, "original_max_position_embeddings", max_position_embeddings)
    original = int(_positive(raw, "original_max_position_embeddings", stated))
    if not 1 <= original <= _MAX_POSITIONS:
        raise CheckpointError(
            f"config.json: original_max_position_embeddings must be a number from 1 to {_MAX_POSITIONS}, not {original}"
        )
    return original


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """As the paper suggests, unless the checkpoint states one (YaRN, section 3.4)."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor", "yarn")
    # transformers takes 0 for absent; what is neither a number nor absent is refused by `_number`.
    if all(parameters.get(key) not in (None, 0) for key in ("mscale", "mscale_all_dim")):
        mscale, mscale_all_dim = (_number(parameters, key, "yarn") for key in ("mscale", "mscale_all_dim"))
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def _parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    stated: list[dict[str, Any]] = []
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} must be an object or null, not {shown(value)}")
        stated.append(value or {})
    if all(stated) and stated[0] != stated[1]:
        raise UnsupportedModelError("config.json: rope_scaling and rope_parameters differ; remove one of them")
    parameters = stated[0] or stated[1]
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError("config.json: rope parameters that differ from layer to layer are not supported")
    if parameters.get("mrope_section") is not None:
        raise UnsupportedModelError("config.json: mrope_section is not supported: positions have one axis here")
    return parameters


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    """Returns a number, or the default where it is absent, null or zero (which transformers takes for absent)."""
    value = values.get(key)
    if value is None or (value == 0 and type(value) in (int, float)):
        return default
    if not _is_positive(value):
        raise CheckpointError(f"config.json: {key} must be a positive number, not {shown(value)}")
    return float(value)


def _factor(parameters: Mapping[str, Any], kind: str) -> float:
    factor = _number(parameters, "factor", kind)
    if factor > _MAX_FACTOR:
        raise CheckpointError(
            f"config.json: factor of rope type {kind!r} must be at most {_MAX_FACTOR:g}, not {shown(factor)}"
        )
    return factor


def _number(parameters: Mapping[str, Any], key: str, kind: str) -> float:
    value = parameters.get(key)
    if not _is_positive(value):
        raise CheckpointError(f"config.json: rope type {kind!r} needs a positive {key}, not {shown(value)}")
    return float(value)


def _is_positive(value: Any) -> TypeGuard[float]:
    """Returns a number that a float holds; JSON has whole numbers of any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
