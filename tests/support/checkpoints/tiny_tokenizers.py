"""Tokenizer directories of a few hundred tokens, in the two forms that checkpoints have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "Mesh of experts: each token goes to the two experts that its gate likes best; 1234567890.",
    "Grüße aus Köln, señor; déjà vu. Привет, мир. 你好,世界。 def f(x):\n    return x + 1\n",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level_tokenizer(vocabulary_size: int = 400) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes are characters, nothing is unknown. Ids 0..3: <pad> <s> </s> <|user|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer(vocabulary_size: int = 420) -> Tokenizer:
    """As Llama 2 and Mixtral: "▁" for a space, bytes for what the vocabulary lacks. Ids 0..2: <unk> <s> </s>."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 256, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    # Only the first two lines, so that other scripts need fallback bytes.
    learner.train_from_iterator(CORPUS[:2], trainer)
    model = json.loads(learner.to_str())["model"]
    fallback = {f"<0x{value:02X}>": 3 + value for value in range(256)}
    learned = {token: token_id for token, token_id in model["vocab"].items() if token_id >= 3}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | fallback
    vocabulary |= {token: 259 + rank for rank, token in enumerate(sorted(learned, key=learned.__getitem__))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = learner.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_tokenizer_directory(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_config: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """A checkpoint without weights. `tokenizer_config` adds to, `chat_template` None leaves out."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write(directory / "tokenizer_config.json", settings | dict(tokenizer_config or {}))
    model = {"model_type": "mixtral", "eos_token_id": 2, "vocab_size": tokenizer.get_vocab_size()}
    _write(directory / "config.json", model | dict(config or {}))
    if generation_config is not None:
        _write(directory / "generation_config.json", generation_config)
    return directory


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
