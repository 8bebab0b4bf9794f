from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.schema.openai_schema import CompletionRequest, parse_request
from services.router.front.text.checkpoint_file import read_checkpoint_defaults


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_end_of_sequence_ids_of_both_files_count(tmp_path: Path) -> None:
    write(tmp_path, config={"eos_token_id": 2, "vocab_size": 9}, generation_config={"eos_token_id": [3, 4]})
    defaults = read_checkpoint_defaults(tmp_path)
    assert defaults.eos_token_ids == {2, 3, 4}
    assert defaults.vocabulary_size == 9


def test_sampling_defaults_are_the_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True})
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.95, 20)


def test_penalties_of_the_checkpoint_count_as_in_vllm(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"repetition_penalty": 1.05, "min_p": 0.1})
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.repetition_penalty, defaults.min_p) == (1.05, 0.1)


def test_a_penalty_that_divides_by_zero_is_refused(tmp_path: Path) -> None:
    write(tmp_path, config={}, generation_config={"repetition_penalty": 0})
    with pytest.raises(CheckpointError, match="repetition_penalty"):
        read_checkpoint_defaults(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("temperature", -1, "a number from 0 to 2"),
        ("temperature", "0.6", "a number from 0 to 2"),
        ("temperature", float("nan"), "a number from 0 to 2"),
        ("temperature", [0.6], "a number from 0 to 2"),
        ("top_p", 0, "a number above 0 and at most 1"),
        ("top_p", {}, "a number above 0 and at most 1"),
        ("top_k", 2.5, "a whole number from -1 on"),
        ("top_k", -2, "a whole number from -1 on"),
        ("min_p", True, "a number from 0 to 1"),
        ("repetition_penalty", -0.5, "a number above 0"),
        ("eos_token_id", [[2]], "a token id"),
        ("eos_token_id", "2", "a token id"),
        ("eos_token_id", {"id": 2}, "a token id"),
    ],
)
def test_a_value_that_a_request_could_not_have_is_refused_by_file_and_key(
    key: str, value: Any, right: str, tmp_path: Path
) -> None:
    write(tmp_path, config={}, generation_config={key: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} must be {right}.*, not "):
        read_checkpoint_defaults(tmp_path)


ODD_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=ODD_VALUES | st.floats(-3, 3) | st.integers(-3, 3))
def test_the_files_values_are_right_exactly_where_a_requests_are(key: str, value: Any, tmp_path: Path) -> None:
    # As JSON text has it: what is written is what both read.
    body = json.dumps({"model": "m", "prompt": "p", key: value})
    write(tmp_path, generation_config={key: value})
    try:
        parse_request(body.encode(), CompletionRequest)
    except InvalidRequestError:
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} must be"):
            read_checkpoint_defaults(tmp_path)
    else:
        read_checkpoint_defaults(tmp_path)


def test_null_says_nothing(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "eos_token_id"))
    write(tmp_path, config={"eos_token_id": None, "vocab_size": None}, generation_config=nothing)
    assert read_checkpoint_defaults(tmp_path) == read_checkpoint_defaults(tmp_path / "nowhere")


@pytest.mark.parametrize("text_config", [{}, {"vocab_size": 5, "eos_token_id": 3}, []])
def test_what_the_model_does_not_read_of_its_config_says_nothing_of_tokens_either(
    text_config: object, tmp_path: Path
) -> None:
    """An object inside the config that no family here has: with one, no token id of a prompt was too large."""
    write(tmp_path, config={"vocab_size": 400, "eos_token_id": 2, "text_config": text_config}, generation_config={})
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.vocabulary_size, defaults.eos_token_ids) == (400, frozenset({2}))


def test_without_files_sampling_is_plain(tmp_path: Path) -> None:
    defaults = read_checkpoint_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (1.0, 1.0, 0)
    assert (defaults.min_p, defaults.repetition_penalty) == (0.0, 1.0)
    assert defaults.eos_token_ids == frozenset()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_checkpoint_defaults(tmp_path)


def test_keys_that_would_change_an_answer_of_transformers_and_change_none_here_are_named(tmp_path: Path) -> None:
    stated = {"stop_strings": ["END"], "suppress_tokens": [7], "num_beams": 4, "typical_p": 1.0, "bad_words_ids": None}
    write(tmp_path, config={}, generation_config=stated)
    assert read_checkpoint_defaults(tmp_path).not_applied == ("num_beams", "stop_strings", "suppress_tokens")


def test_what_transformers_writes_by_itself_is_not_named(tmp_path: Path) -> None:
    new_config: Any = GenerationConfig
    new_config(temperature=0.6, do_sample=True).save_pretrained(tmp_path)
    everything = new_config().to_dict() | {"num_beams": 1, "typical_p": 1.0, "guidance_scale": None}
    write(tmp_path, generation_config=everything)
    assert read_checkpoint_defaults(tmp_path).not_applied == ()
