"""The tokens that a checkpoint names or adds beside those of `tokenizer.json`, by the rules of transformers 5.

Names (`bos_token`, ..., and any other `..._token`, such as `image_token`) are what a chat template may write. All that
is named or added is found in texts as one token; what is special does not show in answers. `tokenizer_class` is not
looked at: a published `tokenizer.json` says all that such a class would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from services.router.front.text.checkpoint_file import CheckpointFile

_STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the files beside `tokenizer.json` say."""

    named: dict[str, list[AddedToken]]
    """By `bos_token` and so on. There may be several of `eos_token`: each ends a turn, the first is the template's."""
    stored: list[AddedToken]
    """With ids of their own in the files, by id. One that `tokenizer.json` has with other flags counts all the same."""
    extra: list[AddedToken]
    """Special without a name."""

    @property
    def texts(self) -> dict[str, str]:
        """What a chat template writes by its names."""
        return {name: tokens[0].content for name, tokens in self.named.items()}

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Adds those that the tokenizer lacks, or has with other flags; one with a name is special whatever it says."""
        named = [token for tokens in self.named.values() for token in tokens]
        named_texts = {token.content for token in named}
        latest = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        new: list[AddedToken] = []
        for token in self.stored:
            if repr(token) != repr(latest.get(token.content)):
                latest[token.content] = token
                new.append(token)
        for token in latest.values():
            if token.content in named_texts and not token.special:
                token.special = True
                new.append(token)
        for token in [*named, *self.extra]:
            if token.content not in latest:
                latest[token.content] = token
                token.special = token.special or token.content in named_texts
                new.append(token)
        tokenizer.add_tokens(new)


def read_special_tokens(directory: Path, config: CheckpointFile, tokenizer: Tokenizer) -> SpecialTokens:
    """`config`: `tokenizer_config.json`. Where it has no `added_tokens_decoder`, the files of older checkpoints count
    too: `special_tokens_map.json`, before it, and `added_tokens.json`. Raises CheckpointError."""
    decoder = config.section("added_tokens_decoder")
    if decoder is not None:
        return SpecialTokens(_named(config, None), _decoder_tokens(config, decoder), _extra(config, None))
    older = CheckpointFile.read(directory, "special_tokens_map.json")
    named, extra = _named(config, older), _extra(config, older)
    special_texts = {token.content for tokens in [*named.values(), extra] for token in tokens}
    stored = _older_tokens(CheckpointFile.read(directory, "added_tokens.json"), special_texts, tokenizer)
    return SpecialTokens(named, stored, extra)


def _named(config: CheckpointFile, older: CheckpointFile | None) -> dict[str, list[AddedToken]]:
    found: dict[str, list[AddedToken]] = {}
    for name in _STANDARD_NAMES:
        # A null in the file that counts first says that there is none, as transformers reads it.
        file = older if older is not None and name in older.values else config
        if name == "eos_token" and isinstance(file.values.get(name), list):
            found[name] = _listed(file, name)
        elif file.values.get(name) is not None:
            found[name] = [_added_token(file, name)]
    for file in (config,) if older is None else (config, older):
        for name, value in file.values.items():
            is_free = name not in _STANDARD_NAMES and name not in found
            if is_free and name.endswith("_token") and _is_token(value):
                found[name] = [_added_token(file, name)]
    if isinstance(config.values.get(_EXTRA), dict):
        extra = config.section(_EXTRA)
        found |= {name: [_added_token(extra, name)] for name in extra.values} if extra is not None else {}
    return {name: tokens for name, tokens in found.items() if tokens}


def _extra(config: CheckpointFile, older: CheckpointFile | None) -> list[AddedToken]:
    """Under the newer of two names, if both are there."""
    if isinstance(config.values.get(_EXTRA), dict):
        return []
    tokens = _listed(config, _EXTRA) or _listed(config, _OLD_EXTRA)
    if older is None:
        return tokens
    older_tokens = _listed(older, _EXTRA)
    older_tokens = older_tokens if tokens or older_tokens else _listed(older, _OLD_EXTRA)
    for token in older_tokens:
        token.special = True
    return tokens + older_tokens


def _decoder_tokens(config: CheckpointFile, decoder: CheckpointFile) -> list[AddedToken]:
    for token_id in decoder.values:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 11):
            config.refuse("added_tokens_decoder", "a map of token ids, written as strings, to tokens")
    return [_added_token(decoder, token_id) for token_id in sorted(decoder.values, key=int)]


def _older_tokens(file: CheckpointFile, special_texts: set[str], tokenizer: Tokenizer) -> list[AddedToken]:
    """Of `added_tokens.json`, a map of tokens to ids; what `tokenizer.json` adds under the same id counts instead."""
    for text, token_id in file.values.items():
        if type(token_id) is not int or not 0 <= token_id < 1 << 31:
            file.refuse(text, "a token id: a whole number from 0 to 2147483647")
    taken = tokenizer.get_added_tokens_decoder()
    texts = [text for text, token_id in sorted(file.values.items(), key=lambda item: item[1]) if token_id not in taken]
    return [AddedToken(text, normalized=text not in special_texts, special=text in special_texts) for text in texts]


def _listed(file: CheckpointFile, key: str) -> list[AddedToken]:
    return [_added_token(item, at) for item in file.items(key) for at in item.values]


def _is_token(value: Any) -> bool:
    """Of a key that only ends as names of tokens do, such as `add_bos_token`."""
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _added_token(file: CheckpointFile, key: str) -> AddedToken:
    """A string stands for a special token, as in transformers."""
    value = file.values[key]
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        file.refuse(key, "a string or an object with a string `content`")
    token = CheckpointFile(file.name, value, f"{file.path}{key}.")
    flags = [flag for flag in _FLAGS if value.get(flag) is not None]
    return AddedToken(value["content"], **{flag: token.flag(flag) for flag in flags})
