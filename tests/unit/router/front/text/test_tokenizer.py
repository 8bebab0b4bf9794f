"""The tokenizer must do what transformers does, so most tests here ask transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from common.errors import CheckpointError, InvalidRequestError
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.tiny_tokenizers import (
    CHAT_TEMPLATE,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_tokenizer_directory,
)

TEXTS = (
    "The quick brown fox",
    " leading space, trailing space ",
    "two\n\nlines\tand tab",
    "Grüße 你好 👩‍🚀 naïve e\u0301",
    "<s>[INST] special tokens </s> in text <|user|>",
    "",
    "x" * 500,
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": " c "},
    ],
)
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
}


def bos_first(tokenizer: Tokenizer) -> Tokenizer:
    bos_id = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    return tokenizer


def both(directory: Path, tokenizer: Tokenizer, **files: Any) -> tuple[TextTokenizer, Any]:
    write_tokenizer_directory(directory, tokenizer, **files)
    return TextTokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module", params=sorted(KINDS))
def ours_and_theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return both(tmp_path_factory.mktemp(request.param), KINDS[request.param]())


def test_completion_prompts_encode_as_transformers_encodes_them(ours_and_theirs: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = ours_and_theirs
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_encodes_and_decodes_as_in_transformers(ours_and_theirs: tuple[TextTokenizer, Any], text: str) -> None:
    ours, theirs = ours_and_theirs
    token_ids = theirs(text)["input_ids"]
    assert ours.encode(text) == token_ids
    assert ours.vocabulary.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


def test_chats_encode_as_transformers_encodes_them(ours_and_theirs: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = ours_and_theirs
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.encode(ours.render_chat(chat, {}), add_special_tokens=False) == expected


@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("has_post_processor", [True, False])
def test_add_bos_token_counts_as_it_does_in_transformers(
    tmp_path: Path, add_bos_token: bool | None, has_post_processor: bool
) -> None:
    tokenizer = bos_first(byte_level_tokenizer()) if has_post_processor else byte_level_tokenizer()
    ours, theirs = both(tmp_path, tokenizer, tokenizer_config={"add_bos_token": add_bos_token})
    assert ours.encode("The quick") == theirs("The quick")["input_ids"]


def test_special_tokens_that_tokenizer_json_lacks_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    settings_ = {
        "bos_token": "<begin>",
        "eos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": False, "rstrip": True, "normalized": False},
        "additional_special_tokens": ["<extra>"],
        "added_tokens_decoder": {"400": {"content": "<decoder>", "special": False, "normalized": False}},
    }
    ours, theirs = both(tmp_path, byte_level_tokenizer(), tokenizer_config=settings_)
    for text in ("<begin>a<end> b<extra>c<decoder>d", "<decoder><extra>"):
        token_ids = theirs(text)["input_ids"]
        assert ours.encode(text) == token_ids
        assert ours.vocabulary.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


IMAGE = {"__type": "AddedToken", "content": "<image>", "rstrip": True}
NAMED_BESIDE_THE_USUAL: dict[str, dict[str, Any]] = {
    "a name of the model's own": {"image_token": "<image>", "eot_token": "<|user|>"},
    "with flags": {"image_token": IMAGE},
    "a map of names": {"extra_special_tokens": {"image_token": "<image>", "eot_token": "<|user|>"}},
    "a map and names": {"extra_special_tokens": {"image_token": "<image>"}, "eot_token": "</s>"},
    "no token at all": {"add_bos_token": False, "image_token": None, "eot_token": 3, "x_token": {"a": 1}},
}
WRITES_ALL_NAMES = "{{ bos_token }}|{{ image_token }}|{{ eot_token }}|{{ pad_token }}|{{ x_token }}"


@pytest.mark.parametrize("said", NAMED_BESIDE_THE_USUAL)
def test_a_template_writes_the_tokens_that_a_checkpoint_names_beside_the_usual_ones(tmp_path: Path, said: str) -> None:
    fields = NAMED_BESIDE_THE_USUAL[said] | {"chat_template": WRITES_ALL_NAMES}
    ours, theirs = both(tmp_path, byte_level_tokenizer(), tokenizer_config=fields)
    assert ours.render_chat(CHATS[0], {}) == theirs.apply_chat_template(CHATS[0], tokenize=False)
    text = "a <image> b<|user|>"
    token_ids = theirs(text)["input_ids"]
    assert ours.encode(text) == token_ids
    assert ours.vocabulary.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


def with_flags(tokenizer: Tokenizer, content: str, **flags: bool) -> Tokenizer:
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token.update(flags if token["content"] == content else {})
    return Tokenizer.from_str(json.dumps(raw))


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token": "<|user|>"},
        {"eot_token": "<|user|>"},
        {"added_tokens_decoder": {"3": {"content": "<|user|>", "special": True}}},
        {"added_tokens_decoder": {"3": {"content": "<|user|>", "special": True, "lstrip": True, "rstrip": True}}},
    ],
    ids=str,
)
def test_a_token_that_tokenizer_json_has_with_other_flags_counts_as_transformers_has_it(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    ours, theirs = both(
        tmp_path, with_flags(byte_level_tokenizer(), "<|user|>", special=False), tokenizer_config=fields
    )
    text = "a <|user|> b"
    token_ids = theirs(text)["input_ids"]
    assert ours.encode(text) == token_ids
    assert "user" not in ours.vocabulary.decode(token_ids)
    assert ours.vocabulary.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


def test_added_tokens_of_older_checkpoints_count(tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), tokenizer_config={"eos_token": "<end>"})
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 401, "<end>": 400, "<s>": 1, "<taken>": 2}')
    ours, theirs = TextTokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a<tool>b<end><taken><s>"
    token_ids = theirs(text)["input_ids"]
    assert ours.encode(text) == token_ids
    assert {400, 401} < set(token_ids)
    assert ours.vocabulary.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.defaults.eos_token_ids == {2, 400}


def test_special_tokens_map_of_older_checkpoints_counts(tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|user|>"}}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = CHATS[0]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert TextTokenizer.from_directory(tmp_path).render_chat(chat, {}) == expected
    assert expected.startswith("<|user|>")


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type", "base"),
    [
        (Qwen2Tokenizer, "qwen3_moe", byte_level_tokenizer),
        (LlamaTokenizer, "mixtral", byte_fallback_tokenizer),
        (LlamaTokenizer, "qwen3_moe", byte_fallback_tokenizer),
    ],
)
def test_directories_that_transformers_itself_saves_are_read_alike(
    tmp_path: Path, tokenizer_class: Any, model_type: str, base: Callable[[], Tokenizer]
) -> None:
    model = json.loads(base().to_str())["model"]
    saved = tokenizer_class(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    saved.chat_template = CHAT_TEMPLATE
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = TextTokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        token_ids = theirs(text)["input_ids"]
        assert ours.encode(text) == token_ids
        assert ours.vocabulary.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ours.render_chat(chat, {}) == expected


def test_truncation_and_padding_of_tokenizer_json_do_not_touch_prompts(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    ours, theirs = both(tmp_path, tokenizer)
    for text in ("The quick brown fox jumps", "a"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_chat_template_file_counts_before_the_configuration(tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer())
    (tmp_path / "chat_template.jinja").write_text("file: {{ messages[0]['content'] }}")
    assert TextTokenizer.from_directory(tmp_path).render_chat(CHATS[0], {}) == "file: Hello there"


def test_of_named_templates_the_default_one_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), tokenizer_config={"chat_template": templates})
    assert TextTokenizer.from_directory(tmp_path).render_chat(CHATS[0], {}) == "plain"


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), chat_template=None)
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        TextTokenizer.from_directory(tmp_path).render_chat(CHATS[0], {})


@pytest.mark.parametrize("content", [None, "{", '{"model": {"type": "nothing"}}'])
def test_missing_or_damaged_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer_config", "ends"),
    [
        ({"eos_token_id": None}, {}, {"eos_token": "<|user|>"}, ["<|user|>"]),
        ({"eos_token_id": None}, {}, {"eos_token": {"content": "<|user|>", "special": True}}, ["<|user|>"]),
        ({"eos_token_id": None}, {}, {"eos_token": ["<|user|>", "</s>"]}, ["<|user|>", "</s>"]),
        ({"eos_token_id": None}, {}, {"eos_token": "<added>"}, ["<added>"]),
        ({"eos_token_id": 1}, {"eos_token_id": [0]}, {"eos_token": "</s>"}, ["<s>", "<pad>", "</s>"]),
        ({"eos_token_id": 2}, {}, {"eos_token": None}, ["</s>"]),
        ({"eos_token_id": None}, {}, {"eos_token": None}, []),
    ],
)
def test_a_turn_ends_with_what_any_of_the_three_files_names(
    config: dict[str, Any],
    generation: dict[str, Any],
    tokenizer_config: dict[str, Any],
    ends: list[str],
    tmp_path: Path,
) -> None:
    write_tokenizer_directory(
        tmp_path,
        byte_level_tokenizer(),
        config=config,
        generation_config=generation,
        tokenizer_config=tokenizer_config,
    )
    tokenizer = TextTokenizer.from_directory(tmp_path)
    assert tokenizer.defaults.eos_token_ids == {tokenizer._tokenizer.token_to_id(end) for end in ends}


def test_a_turns_end_that_only_the_older_token_map_names_counts(tmp_path: Path) -> None:
    write_tokenizer_directory(tmp_path, byte_level_tokenizer(), config={"eos_token_id": None})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|user|>"}')
    assert TextTokenizer.from_directory(tmp_path).defaults.eos_token_ids == {3}
