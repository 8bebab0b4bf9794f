"""Small real tokenizers in the two styles that checkpoints come with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog looks on.",
    "def route(tokens: list[int]) -> dict[int, float]:\n    return {expert: weight for expert, weight in top(tokens)}",
    "Each token goes to the experts that the gate has chosen; their answers are weighed and added in order.",
    "Über den Wolken muss die Freiheit wohl grenzenlos sein. Ça va? 你好,世界。 Привет, мир!",
)


class TokenizerStyle(StrEnum):
    """BYTE_LEVEL: Qwen's and GPT-2's. SENTENCE_PIECE: Mixtral's, with blanks as ▁, bytes as fallback, a first token."""

    BYTE_LEVEL = "byte_level"
    SENTENCE_PIECE = "sentence_piece"


@dataclass(frozen=True)
class WrittenTokenizer:
    """What the model's config must know of it."""

    size: int
    begin_token_id: int | None
    end_token_ids: tuple[int, ...]


def write_tokenizer(directory: Path, style: TokenizerStyle, context_tokens: int) -> WrittenTokenizer:
    """Writes `tokenizer.json` and `tokenizer_config.json` with a chat template."""
    is_byte_level = style is TokenizerStyle.BYTE_LEVEL
    tokenizer = _byte_level() if is_byte_level else _sentence_piece()
    begin = None if is_byte_level else "<s>"
    ends = ["<|im_end|>", "<|endoftext|>"] if is_byte_level else ["</s>"]
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "bos_token": begin,
        "eos_token": ends[0],
        "pad_token": ends[-1],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE if is_byte_level else INSTRUCTION_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2))
    vocabulary = tokenizer.get_vocab()
    return WrittenTokenizer(
        size=len(vocabulary),
        begin_token_id=None if begin is None else vocabulary[begin],
        end_token_ids=tuple(vocabulary[token] for token in ends),
    )


CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
INSTRUCTION_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _sentence_piece() -> Tokenizer:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(
        TRAINING_TEXT, trainers.BpeTrainer(vocab_size=130, show_progress=False, special_tokens=[])
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *fallback, *sorted(learned["vocab"], key=learned["vocab"].__getitem__)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer
