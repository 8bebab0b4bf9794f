"""The demo model's tokenizer: one token a byte, and one token for each word of the phrasings.

Numbers, names and words that are asked about therefore come as single characters, which is what a small model needs to
add, spell and sort; the words around them cost one token each. Any text comes back: what is not a known word is bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compose.demo.tasks.task import Task

END_OF_TEXT = "<|endoftext|>"
TURN_END = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_END, USER, ASSISTANT)

# System messages are left out: the model was trained without any.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(tasks: Iterable[Task]) -> Tokenizer:
    """Byte-level, without merges: a known word is taken whole, any other text byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = sorted({piece for word in _fixed_words(tasks) for piece in _forms(word)} - set(alphabet))
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet, *words))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _fixed_words(tasks: Iterable[Task]) -> set[str]:
    """Words of questions and answers that are not arguments; those of one letter are bytes already."""
    texts: list[str] = []
    for task in tasks:
        texts.append(task.fixed_words)
        if not task.spells_phrasings:
            texts += [re.sub(r"\{\w+\}", "", phrasing) for group in task.phrasings.values() for phrasing in group]
    return {word for text in texts for word in re.findall(r"[A-Za-z]{2,}", text)} | {"Please"}


def _forms(word: str) -> tuple[str, ...]:
    """As a word stands in a sentence (`Ġ` is the byte-level sign of a space), and as it begins one."""
    lower, upper = word.lower(), word[0].upper() + word[1:]
    within = "Ġ" + (word if word[0].isupper() else lower)
    return within, "Ġ" + lower, lower, upper


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Returns the id of a token that exists."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"{token!r} is not a token")
    return int(number)
