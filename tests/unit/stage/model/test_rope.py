"""Frequencies and attention factors against transformers' own, for every kind of rope that is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

from common.checkpoint.rope_config import read_rope_config
from common.compute.rotary import apply_rotary
from services.stage.model.attention import RotaryTable, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1e7},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, other wavelengths": LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "yarn": YARN,
    "yarn, no original length": {key: value for key, value in YARN.items() if not key.startswith("original")},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, own betas": YARN | {"beta_fast": 20, "beta_slow": 2},
    "yarn, betas that meet": YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
    "yarn, stated attention factor": YARN | {"attention_factor": 1.25},
    "yarn, mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn, one mscale": YARN | {"mscale": 0.707},
    "yarn, large factor": YARN | {"factor": 40.0, "original_max_position_embeddings": 4096},
    "yarn, factor by the lengths": YARN | {"factor": None},
    "yarn, factor 1": YARN | {"factor": 1.0},
}


def theirs(parameters: dict[str, Any], head_dim: int, **more: Any) -> Any:
    return MixtralConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=1024,
        rope_parameters=dict(parameters),
        **more,
    )


@pytest.mark.parametrize("head_dim", [16, 24, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_factor_are_transformers_own(kind: str, head_dim: int) -> None:
    config = theirs(KINDS[kind], head_dim)
    if KINDS[kind]["rope_type"] == "default":
        embedding: Any = MixtralRotaryEmbedding(config)
        frequencies, factor = embedding.inv_freq, embedding.attention_scaling
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]](config, torch.device("cpu"))
    ours = read_rope_config({"rope_parameters": KINDS[kind]}, 1e6, 1024)
    assert torch.equal(inverse_frequencies(ours, head_dim), frequencies)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_form_of_the_fields_means_the_same(kind: str) -> None:
    parameters = dict(KINDS[kind])
    theta, rope_type = parameters.pop("rope_theta"), parameters.pop("rope_type")
    old = {"rope_theta": theta, "rope_scaling": {"type": rope_type, **parameters} if parameters else None}
    assert read_rope_config(old, 1e6, 1024) == read_rope_config({"rope_parameters": KINDS[kind]}, 1e6, 1024)


def test_an_original_length_beside_the_parameters_counts_more_as_with_transformers() -> None:
    config = theirs(YARN, 16, original_max_position_embeddings=64)
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = read_rope_config({"rope_parameters": YARN, "original_max_position_embeddings": 64}, 1e6, 1024)
    assert torch.equal(inverse_frequencies(ours, 16), frequencies)


def test_without_any_field_the_familys_theta_is_taken() -> None:
    ours = read_rope_config({}, 1e6, 1024)
    assert (ours.kind, ours.theta) == ("default", 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
def test_rows_of_the_table_turn_heads_as_transformers_turns_them(kind: str, dtype: torch.dtype) -> None:
    config = theirs(KINDS[kind], 16)
    positions = torch.tensor([0, 1, 7, 500, 3, 1023])
    query = torch.randn((1, 4, 6, 16), generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = MixtralRotaryEmbedding(config)(query, positions[None])
    wanted, _ = apply_rotary_pos_emb(query, query, cos, sin)
    table = RotaryTable(read_rope_config({"rope_parameters": KINDS[kind]}, 1e6, 1024), 16, 1024, dtype)
    turned = apply_rotary(query[0].transpose(0, 1), *table.rows(positions), kernels=None).transpose(0, 1)
    assert torch.equal(turned, wanted[0])


@pytest.mark.parametrize(
    ("rope", "max_positions", "context"),
    [
        (None, 1024, 1024),
        ({"rope_type": "linear", "factor": 2.5}, 1024, 2560),
        ({"rope_type": "linear", "factor": 0.5}, 1024, 1024),
        (LLAMA3, 1024, 1024),
        (YARN, 128, 1024),
        (YARN, 1024, 1024),
        (YARN, 40960, 40960),
        ({"rope_type": "yarn", "factor": 4.0}, 128, 512),
        (YARN | {"factor": None}, 2048, 2048),
    ],
)
def test_the_context_is_what_the_scaling_is_made_for_and_never_below_the_stated_one(
    rope: dict[str, Any] | None, max_positions: int, context: int
) -> None:
    assert read_rope_config({"rope_parameters": rope}, 1e6, max_positions).context_tokens(max_positions) == context
