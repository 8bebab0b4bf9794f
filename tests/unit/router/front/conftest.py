"""One tiny tokenizer for all tests of the front."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.tiny_tokenizers import byte_level_tokenizer, write_tokenizer_directory


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return TextTokenizer.from_directory(write_tokenizer_directory(directory, byte_level_tokenizer()))
