"""The list of tensors against what transformers writes, and what is said of one that does not fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint.directory import read_tensor_index
from common.checkpoint.model_config import read_model_config
from common.checkpoint.tensor_names import (
    EMBEDDING,
    LM_HEAD,
    check_tensors,
    embedding_name,
    expected_tensors,
    lm_head_name,
    stage_tensors,
    unused_tensors,
)
from common.errors import CheckpointError
from common.topology import CheckpointPart, LayerRange
from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.support.checkpoints.tiny_checkpoints import (
    MIXTRAL_SHARDED,
    QWEN3_TIED_SHARDED_BF16,
    RECIPES,
    Recipe,
    write_checkpoint,
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_list_is_exactly_what_transformers_writes(recipe: Recipe, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", recipe)
    config, index = read_model_config(directory), read_tensor_index(directory)
    check_tensors(config, index)
    assert {name for name, _ in expected_tensors(config, index)} == set(index)


def test_a_tensor_that_is_missing_misshapen_or_of_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config, index = read_model_config(directory), dict(read_tensor_index(directory))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        check_tensors(config, {key: value for key, value in index.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[1, 2\]"):
        check_tensors(config, index | {name: replace(index[name], shape=(1, 2))})
    with pytest.raises(CheckpointError, match=f"{name} is stored as I8"):
        check_tensors(config, index | {name: replace(index[name], dtype="I8")})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_parts_make_up_the_whole_and_share_nothing_but_a_tied_embedding(recipe: Recipe, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", recipe)
    config, index = read_model_config(directory), read_tensor_index(directory)
    last = config.num_layers
    parts = [
        CheckpointPart(LayerRange(0, 1)),
        CheckpointPart(LayerRange(1, last - 1)),
        CheckpointPart(LayerRange(last - 1, last)),
        CheckpointPart(experts=frozenset(range(2))),
        CheckpointPart(experts=frozenset(range(2, config.num_experts))),
    ]
    named = Counter(name for part in parts for name, _ in expected_tensors(config, index, part))
    assert named.keys() == index.keys()
    assert {name for name, count in named.items() if count > 1} == (
        {"model.embed_tokens.weight"} if recipe.tied else set()
    )


def test_a_part_lacks_only_what_is_its_own(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config, index = read_model_config(directory), read_tensor_index(directory)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    without = {key: value for key, value in index.items() if key != name}
    check_tensors(config, without, CheckpointPart(LayerRange(0, 4), frozenset({0, 1, 2})))
    with pytest.raises(CheckpointError, match=f"{name} is missing in the folder"):
        check_tensors(config, without, CheckpointPart(experts=frozenset({3})), "the folder")


def test_the_first_stage_has_the_embedding_and_the_last_one_what_makes_logits(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config, index = read_model_config(directory), read_tensor_index(directory)
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}

    def ends_of(start: int, stop: int) -> set[str]:
        return ends & {name for name, _ in stage_tensors(config, index, LayerRange(start, stop))}

    assert ends_of(0, 2) == {"model.embed_tokens.weight"}
    assert ends_of(1, 3) == set()
    assert ends_of(2, 4) == {"model.norm.weight", "lm_head.weight"}
    assert ends_of(0, 4) == ends


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_tensor_that_transformers_writes_is_unused(recipe: Recipe, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", recipe)
    assert unused_tensors(read_model_config(directory), read_tensor_index(directory)) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "attention_bias"),
        ("model.layers.0.self_attn.sinks", "does not compute with it"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "does not compute with it"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "does not compute with it"),
        ("model.layers.0.mlp.experts.99.up_proj.weight", "number of experts is 8"),
        ("model.layers.0.mlp.experts.gate_up_proj", "does not compute with it"),
        ("model.layers.4.input_layernorm.weight", "num_hidden_layers is 4"),
        ("model.norm.bias", "no such bias"),
        ("lm_head.bias", "no such bias"),
    ],
)
def test_a_tensor_that_contradicts_the_config_is_never_ignored(name: str, why: str, tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config, index = read_model_config(directory), dict(read_tensor_index(directory))
    assert (config.num_layers, config.num_experts) == (4, 8)
    with pytest.raises(CheckpointError, match=f"tensor {name} is in the checkpoint.*{why}"):
        unused_tensors(config, index | {name: index["model.norm.weight"]})


def test_norms_of_queries_and_keys_in_a_family_without_them_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", MIXTRAL_SHARDED)
    config, index = read_model_config(directory), dict(read_tensor_index(directory))
    name = "model.layers.1.self_attn.q_norm.weight"
    with pytest.raises(CheckpointError, match=f"{name} .*'mixtral' does not compute with it"):
        unused_tensors(config, index | {name: index["model.norm.weight"]})


def test_tensors_outside_the_decoder_are_unused_and_named(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    config, index = read_model_config(directory), dict(read_tensor_index(directory))
    names = [
        "mtp.layers.0.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "score.weight",
        "v_head.summary.bias",
    ]
    more = dict.fromkeys(names, index["model.norm.weight"])
    check_tensors(config, index | more)
    assert unused_tensors(config, index | more) == sorted(names)


def test_a_stored_lm_head_counts_whatever_the_config_says_of_tying(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", QWEN3_TIED_SHARDED_BF16)
    config, index = read_model_config(directory), dict(read_tensor_index(directory))
    both = index | {LM_HEAD: index[EMBEDDING]}
    head_only = {name: stored for name, stored in both.items() if name != EMBEDDING}
    last = LayerRange(config.num_layers - 1, config.num_layers)
    for names, embedding, head in (
        (index, EMBEDDING, EMBEDDING),
        (both, EMBEDDING, LM_HEAD),
        (head_only, LM_HEAD, LM_HEAD),
    ):
        assert (embedding_name(config, names), lm_head_name(config, names)) == (embedding, head)
        check_tensors(config, names)
        assert unused_tensors(config, names) == []
        assert embedding in dict(stage_tensors(config, names, LayerRange(0, 1)))
        assert head in dict(stage_tensors(config, names, last))
    misshapen = both | {LM_HEAD: replace(index[EMBEDDING], shape=(7, config.hidden_size))}
    with pytest.raises(CheckpointError, match=rf"{LM_HEAD} has shape \[7, "):
        check_tensors(config, misshapen)
