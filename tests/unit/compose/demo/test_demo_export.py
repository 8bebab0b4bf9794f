"""The exported checkpoint computes what the trained model computes, by transformers and by our own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint.model_config import read_model_config
from compose.checkpoint_folder import ModelSizes
from compose.demo.export import LIMITS, export, model_card
from compose.demo.model import DemoModel
from compose.demo.routing_report import most_telling_layer
from compose.demo.tasks.catalog import TASKS
from compose.demo.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(TASKS)


def model_and_checkpoint(directory: Path, kv_heads: int) -> DemoModel:
    sizes = ModelSizes(
        vocabulary=TOKENIZER.get_vocab_size(),
        layers=2,
        width=32,
        heads=4,
        kv_heads=kv_heads,
        head_width=16,
        expert_width=24,
    )
    model = DemoModel(sizes, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            # No weight at its start value: a zero would hide a tensor in the wrong place. Exact in bfloat16.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.2 * noise).bfloat16())
    export(model, TOKENIZER, directory, "card")
    return model


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_transformers_computes_the_same_logits(tmp_path: Path, kv_heads: int) -> None:
    model = model_and_checkpoint(tmp_path, kv_heads)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, TOKENIZER.get_vocab_size(), (3, 19), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, _, _ = model(ids)
        expected = reference(ids).logits
    torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_the_mesh_reads_the_config(tmp_path: Path) -> None:
    model_and_checkpoint(tmp_path, kv_heads=4)
    config = read_model_config(tmp_path)
    assert (config.num_layers, config.num_experts, config.hidden_size) == (2, 8, 32)
    assert config.normalize_expert_weights
    assert config.query_key_norm


def test_the_chat_template_writes_what_was_trained(tmp_path: Path) -> None:
    model_and_checkpoint(tmp_path, kv_heads=4)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Spell fig."},
        {"role": "assistant", "content": "f-i-g"},
        {"role": "user", "content": "1 + 1?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Spell fig.<|end|><|assistant|>f-i-g<|end|><|user|>1 + 1?<|end|><|assistant|>"
    assert tokenizer(text)["input_ids"] == TOKENIZER.encode(text).ids


def test_the_model_card_names_every_task() -> None:
    card = model_card(ModelSizes(vocabulary=1), 1, 1, {task.name: 0.5 for task in TASKS}, 10)
    assert list(LIMITS) == [task.name for task in TASKS]
    assert all(f"| {task.name} |" in card for task in TASKS)


def test_the_most_telling_layer_is_the_one_where_tasks_differ() -> None:
    shares = torch.full((3, 2, 4), 0.25)
    shares[0, 1] = torch.tensor([1.0, 0, 0, 0])
    assert most_telling_layer(shares) == 1
