"""Files of a checkpoint with values that nobody expects: served, or refused by file and key, and no other error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checkpoint.model_config import read_model_config
from common.errors import CheckpointError, UnsupportedModelError
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.tiny_tokenizers import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_tokenizer_directory,
)

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "layer_types": ["full_attention", "full_attention"],
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "truncate": True,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "dtype": "float32",
    "vocab_size": 400,
    "eos_token_id": 2,
    "text_config": None,
}
GENERATION: dict[str, Any] = {
    "eos_token_id": [2],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
TOKENIZER: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "unk_token": None,
    "split_special_tokens": False,
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "500": {"content": "<x>", "rstrip": True}},
    "extra_special_tokens": {"image_token": "<image>"},
    "additional_special_tokens": ["<a>", {"content": "<b>", "normalized": False}],
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}
FILES = {"config.json": MODEL, "generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}
ODD_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.sampled_from([10**400, -1, 0, 1e308, float("nan"), float("inf"), 0.5])
    | st.sampled_from(["", "2", "true", "</s>", "{{", "{% for", "yarn", "linear", "llama3", "default", "silu"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "name", "template", "rope_type", "factor", "3", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value inside."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in entries for found in [(*path, key), *paths_of(inner, (*path, key))]]


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value changed; without it where the value is "absent"."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value == "absent":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_directory(tmp_path_factory.mktemp("odd"), byte_level_tokenizer())


def write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_is_taken_or_refused_by_file_and_key(name: str, directory: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths_of(FILES[name])))
    write(directory, FILES | {name: put(FILES[name], path, data.draw(ODD_VALUES | st.just("absent")))})
    try:
        read_model_config(directory)
        TextTokenizer.from_directory(directory)
    except (CheckpointError, UnsupportedModelError) as error:
        message = error.message
    else:
        return
    assert name in message or "the chat template does not compile" in message


def test_the_files_as_they_are_served(directory: Path) -> None:
    write(directory, FILES)
    assert read_model_config(directory).context_tokens == 256
    assert TextTokenizer.from_directory(directory).defaults.top_k == 20


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("tokenizer_config.json", "added_tokens_decoder", ["<s>"], "added_tokens_decoder must be an object or null"),
        ("tokenizer_config.json", "added_tokens_decoder", {"one": "<s>"}, "added_tokens_decoder must be a map"),
        ("tokenizer_config.json", "added_tokens_decoder", {"7": None}, r"added_tokens_decoder\.7 must be a string or"),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            {"7": {"content": "a", "lstrip": "no"}},
            r"added_tokens_decoder\.7\.lstrip must be",
        ),
        ("tokenizer_config.json", "eos_token", 2, "eos_token must be a string or an object"),
        ("tokenizer_config.json", "bos_token", ["<s>"], "bos_token must be a string or an object"),
        ("tokenizer_config.json", "eos_token", ["</s>", None], r"eos_token\[1\] must be a string or"),
        ("tokenizer_config.json", "additional_special_tokens", ["<a>", 5], r"additional_special_tokens\[1\] must be"),
        ("tokenizer_config.json", "extra_special_tokens", {"image": 5}, r"extra_special_tokens\.image must be"),
        ("tokenizer_config.json", "extra_special_tokens", "<a>", "extra_special_tokens must be a list or null"),
        ("tokenizer_config.json", "split_special_tokens", "false", "split_special_tokens must be true or false"),
        ("tokenizer_config.json", "chat_template", 7, "chat_template must be a string, a list of"),
        ("tokenizer_config.json", "chat_template", [{"name": "default"}], r"chat_template\.template must be a string"),
        ("tokenizer_config.json", "chat_template", ["x"], "chat_template must be a string, a list of"),
        ("tokenizer_config.json", "chat_template", {"default": None}, r"chat_template\.default must be a string"),
        ("tokenizer_config.json", "chat_template", "{{ messages | unknown }}", "the chat template does not compile"),
        ("config.json", "vocab_size", "400", "vocab_size must be a whole number"),
        ("config.json", "eos_token_id", True, "eos_token_id must be a token id"),
        ("special_tokens_map.json", "eos_token", {"text": "</s>"}, "eos_token must be a string or an object"),
    ],
)
def test_what_would_be_right_is_said(name: str, key: str, value: Any, says: str, tmp_path: Path) -> None:
    directory = write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    file = directory / name
    content = json.loads(file.read_text()) if file.exists() else {}
    if key == "extra_special_tokens":
        content.pop("additional_special_tokens", None)
    file.write_text(json.dumps(content | {key: value}))
    with pytest.raises(CheckpointError, match=("" if "compile" in says else name + ": ") + says):
        TextTokenizer.from_directory(directory)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool.jinja"])
def test_a_template_file_that_is_not_utf8_is_named(name: str, tmp_path: Path) -> None:
    directory = write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(CheckpointError, match=rf"{Path(name).name} cannot be read as UTF-8"):
        TextTokenizer.from_directory(directory)


@pytest.mark.parametrize("name", [*FILES, "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"a": 1', b"\xff", b"[" * 99_999])
def test_a_file_that_is_no_json_object_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    directory = write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        TextTokenizer.from_directory(directory)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "eos_token"),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": ["a", {"content": "\udfff"}]},
            "extra_special_tokens[1].content",
        ),
        ("tokenizer_config.json", {"chat_template": {"default": "a\ud800"}}, "chat_template.default"),
        ("special_tokens_map.json", {"bos_token": {"content": "\ud83d"}}, "bos_token.content"),
        ("added_tokens.json", {"\ud800": 400}, r"\ud800"),
        ("generation_config.json", {"\ud800": [{}]}, r"\ud800"),
    ],
)
def test_half_a_surrogate_pair_is_named_by_file_and_key(
    name: str, content: dict[str, Any], place: str, tmp_path: Path
) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    write(tmp_path, {name: content})
    with pytest.raises(CheckpointError) as refused:
        TextTokenizer.from_directory(tmp_path)
    assert refused.value.message == f"{name}: {place} holds half of a surrogate pair, which is not a character"


@pytest.mark.parametrize(("content", "key"), [({"<a>": "400"}, "<a>"), ({"<a>": -1}, "<a>"), ({"<a>": [1]}, "<a>")])
def test_ids_of_added_tokens_are_whole_numbers(content: dict[str, Any], key: str, tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    write(tmp_path, {"added_tokens.json": content})
    with pytest.raises(CheckpointError, match=f"added_tokens.json: {key} must be a token id"):
        TextTokenizer.from_directory(tmp_path)


def test_a_tokenizer_that_the_library_panics_at_is_named_at_start(tmp_path: Path) -> None:
    raw = json.loads(byte_fallback_tokenizer().to_str())
    raw["post_processor"]["single"][0]["SpecialToken"]["id"] = "<nobody>"
    write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    write(tmp_path, {"tokenizer.json": raw})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used"):
        TextTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"num_hidden_layers": "x" * 5000},
        {"tie_word_embeddings": "x" * 5000},
        {"hidden_act": "x" * 5000},
        {"rope_scaling": {"rope_type": "x" * 5000}},
        {"rope_scaling": {"rope_type": "linear", "factor": ["x" * 5000]}},
        {"mlp_only_layers": ["x" * 5000]},
    ],
    ids=lambda content: next(iter(content)),
)
def test_a_refusal_stays_short_whatever_the_value(content: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {"config.json": MODEL | content})
    with pytest.raises((CheckpointError, UnsupportedModelError)) as refused:
        read_model_config(tmp_path)
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("{{", "tokenizer_config.json: chat_template: "),
        ({"default": "{{"}, "tokenizer_config.json: chat_template.default: "),
        ([{"name": "default", "template": "{{"}], "tokenizer_config.json: chat_template, 'default': "),
        (None, "chat_template.jinja: "),
    ],
)
def test_a_template_that_does_not_compile_is_named_by_its_file(template: Any, place: str, tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), chat_template=None)
    if template is None:
        (tmp_path / "chat_template.jinja").write_text("{{")
    else:
        write(tmp_path, {"tokenizer_config.json": {"chat_template": template}})
    with pytest.raises(CheckpointError) as refused:
        TextTokenizer.from_directory(tmp_path)
    assert refused.value.message.startswith(place)
