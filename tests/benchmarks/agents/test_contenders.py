"""Which tokens llama-server must not draw."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.agents.contenders import split_characters
from tests.benchmarks.make_bench_model import SPECIAL_TOKENS, _tokenizer


def test_tokens_that_are_no_whole_characters_are_the_bytes_beyond_ascii(tmp_path: Path) -> None:
    tokenizer = _tokenizer(1024)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = split_characters(tmp_path)
    assert len(found) == 128
    assert all(len(SPECIAL_TOKENS) <= token_id < len(SPECIAL_TOKENS) + 256 for token_id in found)
    # What is left never has half a character.
    whole = [token_id for token_id in range(1024) if token_id not in found]
    assert all(tokenizer.decode([token_id]).isascii() for token_id in whole)
