"""A panic of the tokenizers library costs the request that provokes it, and no client waits for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.errors import ExecutionError
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.tiny_tokenizers import write_tokenizer_directory
from tests.support.front.journalling_front import COMPLETIONS, RESUMABLE, Server, run

NO_TEXT = 3
"""A token of a model that has such an answer; stripping its end is what the library does not bear."""


@pytest.fixture(scope="module")
def stripping(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "</s>": 2, "": NO_TEXT, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Strip(content=" ", left=0, right=1)
    directory: Path = tmp_path_factory.mktemp("stripping")
    return TextTokenizer.from_directory(write_tokenizer_directory(directory, words))


def test_a_panic_is_an_error_of_ours(stripping: TextTokenizer) -> None:
    for decode in (stripping.decode, stripping.vocabulary.decode):
        with pytest.raises(ExecutionError, match="the tokenizer of this checkpoint failed"):
            decode([NO_TEXT])


@pytest.mark.parametrize("fields", [{}, {"stop": ["x"]}, {"stream": True}, {"stream": True, "stop": ["x"]}])
def test_an_answer_that_the_library_does_not_bear_ends_with_an_error(
    stripping: TextTokenizer, tmp_path: Path, fields: dict[str, object]
) -> None:
    async def main() -> None:
        server = Server(stripping, tmp_path / "j", [4, NO_TEXT, 4, 2])
        answer = await asyncio.wait_for(server.ask("POST", COMPLETIONS, RESUMABLE, prompt="hi", **fields), 10)
        assert b"the tokenizer of this checkpoint failed" in answer.body
        fine = Server(stripping, tmp_path / "fine", [4, 4, 2])
        assert (await fine.ask("POST", COMPLETIONS, prompt="hi")).status == 200

    run(main())
