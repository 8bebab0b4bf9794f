"""What clients read: text that follows the prompt's, tokens that join to it, and ends where they were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.tiny_tokenizers import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_tokenizer_directory,
)
from tests.support.front.front_over_engine import CHAT, COMPLETIONS, MESSAGES, Server, run

WORDS = ("▁there", "▁were", "▁many")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """As Mixtral's: its decoder strips the blank at the start of a text."""
    content = json.loads(byte_fallback_tokenizer().to_str())
    content["model"]["vocab"] |= {word: 420 + rank for rank, word in enumerate(WORDS)}
    directory = tmp_path_factory.mktemp("pieces")
    write_tokenizer_directory(directory, Tokenizer.from_str(json.dumps(content)))
    return TextTokenizer.from_directory(directory)


def ids(tokenizer: TextTokenizer, *tokens: str) -> list[int]:
    found = [tokenizer._tokenizer.token_to_id(token) for token in tokens]
    assert None not in found
    return [token_id for token_id in found if token_id is not None]


def byte_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return ids(tokenizer, *(f"<0x{value:02X}>" for value in text.encode()))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_its_blank_with_and_without_the_prompt_in_front(pieces: TextTokenizer, stream: bool) -> None:
    async def text(**fields: Any) -> str:
        server = Server(pieces, script=[*ids(pieces, *WORDS[1:]), 2])
        answer = await server.post(COMPLETIONS, stream=stream, **fields)
        chunks = answer.data[:-1] if stream else [answer.json()]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    async def main() -> None:
        there = ids(pieces, "<s>", WORDS[0])
        assert await text(prompt=there) == " were many"
        assert await text(prompt="there") == " were many"
        assert await text(prompt="there", echo=True) == "there were many"
        assert await text(prompt=there, echo=True) == "<s> there were many"
        assert await text(prompt=there, stop=" many") == " were"
        assert await text(prompt=there, stop=" were") == ""
        assert await text(prompt=there, stop="there were") == " were many", "what the prompt says stops nothing"
        assert await text(prompt=there, stop="re were") == " were many"
        assert await text(prompt=[1]) == "were many", "a text begins without the blank"

    run(main())


def test_tokens_of_log_probabilities_join_to_the_text(pieces: TextTokenizer, tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        byte_level = tokenizer.encode(" 👩 you 好", add_special_tokens=False)
        fallback = [*ids(pieces, "▁were"), *byte_ids(pieces, "👩"), *ids(pieces, "▁many"), *byte_ids(pieces, "é")]
        for used, script in ((tokenizer, byte_level), (pieces, fallback), (pieces, fallback[1:])):
            for prompt in (ids(used, "<s>"), used.encode("fox")):
                for cut in range(1, len(script) + 1):
                    server = Server(used, script=list(script))
                    fields = {"prompt": prompt, "logprobs": 2, "max_tokens": cut}
                    choice = (await server.post(COMPLETIONS, **fields)).json()["choices"][0]
                    logprobs = choice["logprobs"]
                    assert "".join(logprobs["tokens"]) == choice["text"]
                    assert len(logprobs["tokens"]) == cut
                    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
                        assert choice["text"][offset : offset + len(token)] == token
                    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
                        assert top[token] == -0.5
                assert "\ufffd" not in choice["text"]

    run(main())


def test_parts_of_characters_are_told_apart_in_log_probabilities(pieces: TextTokenizer) -> None:
    async def main() -> None:
        script = byte_ids(pieces, "👩")
        server = Server(pieces, script=list(script))
        server.engine.alternatives = ((3 + 0xC3, -0.2), (3 + 0x0A, -0.3), (3 + 0xC4, -1.0))
        choice = (await server.post(COMPLETIONS, prompt="fox", logprobs=3, max_tokens=4)).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == ["", "", "", "👩"]
        assert choice["logprobs"]["top_logprobs"][0] == {"bytes:\\xc3": -0.2, "\n": -0.3, "bytes:\\xc4": -1.0, "": -0.5}
        fields = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "max_tokens": 4}
        content = (await server.post(CHAT, **fields)).json()["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["\\xf0", "\\x9f", "\\x91", "\\xa9"]
        assert bytes(value for entry in content for value in entry["bytes"]).decode() == "👩"
        assert content[0]["top_logprobs"] == [{"token": "\\xc3", "logprob": -0.2, "bytes": [0xC3]}]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_of_byte_tokens_ends_the_choice_at_once(pieces: TextTokenizer, stream: bool) -> None:
    async def main() -> None:
        server = Server(pieces, script=[*ids(pieces, "▁were"), *byte_ids(pieces, "👩\n" + 50 * "\n")])
        fields: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
        answer = await server.post(COMPLETIONS, prompt="there", stop=["\n"], stream=stream, **fields)
        last = answer.data[-2] if stream else answer.json()
        assert last["usage"]["completion_tokens"] == 6
        chunks = [chunk for chunk in answer.data[:-2]] if stream else [last]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " were👩"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert len(server.engine.cancelled) == 1

    run(main())


def test_a_stop_string_after_a_fault_in_a_run_of_bytes_ends_the_choice_at_once(pieces: TextTokenizer) -> None:
    async def main() -> None:
        faulty = [3 + value for value in b"ok\xf0\x9f\n" + 50 * b"\n"]
        server = Server(pieces, script=[*ids(pieces, "▁were"), *faulty])
        reply = (await server.post(COMPLETIONS, prompt="there", stop=["\n"], max_tokens=50)).json()
        assert reply["choices"][0]["text"] == " wereok\ufffd\ufffd"
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] == 6

    run(main())


def test_characters_before_one_that_the_prompt_began_are_echoed(pieces: TextTokenizer) -> None:
    async def main() -> None:
        begun = [*ids(pieces, "<s>"), *byte_ids(pieces, "日👩")[:-1]]
        fields = {"prompt": begun, "max_tokens": 1}
        server = Server(pieces, script=[*byte_ids(pieces, "👩")[-1:]])
        texts = [
            (await server.post(COMPLETIONS, **fields, echo=echo)).json()["choices"][0]["text"] for echo in (False, True)
        ]
        assert texts == ["👩", "<s>日👩"]

    run(main())


def test_a_character_of_byte_tokens_is_streamed_with_its_last_byte(pieces: TextTokenizer) -> None:
    async def main() -> None:
        server = Server(pieces, script=[*byte_ids(pieces, "👩é!")])
        answer = await server.post(COMPLETIONS, prompt="there", stream=True, return_token_ids=True, max_tokens=7)
        assert [chunk["choices"][0]["text"] for chunk in answer.data[:-1]] == ["", "", "", "👩", "", "é", "!"]

    run(main())


def test_a_prompt_that_ends_within_a_character_is_echoed_without_the_part(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        token_ids = tokenizer.encode("fox 👩", add_special_tokens=False)
        server = Server(tokenizer, script=[*token_ids[-1:], 2])
        fields = {"prompt": token_ids[:-1]}
        texts = [
            (await server.post(COMPLETIONS, **fields, echo=echo)).json()["choices"][0]["text"] for echo in (False, True)
        ]
        assert texts == ["👩", "fox 👩"]

    run(main())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_model_whose_end_only_the_tokenizer_names_ends_there(path: str, tmp_path: Path) -> None:
    write_tokenizer_directory(
        tmp_path, byte_level_tokenizer(), config={"eos_token_id": None}, tokenizer_config={"eos_token": "<|user|>"}
    )
    used = TextTokenizer.from_directory(tmp_path)

    async def main() -> None:
        fox = used.encode("fox")
        server = Server(used, script=[*fox, 3, *fox * 20])
        fields = {"prompt": "hi"} if path == COMPLETIONS else {"messages": MESSAGES}
        answer = (await server.post(path, **fields)).json()
        assert answer["usage"]["completion_tokens"] == len(fox) + 1
        assert answer["choices"][0]["finish_reason"] == "stop"

    run(main())


def test_a_special_token_as_a_stop_string_ends_the_choice(tokenizer: TextTokenizer) -> None:
    async def main() -> None:
        fox = tokenizer.encode("fox")
        server = Server(tokenizer, script=[*fox, 3, *fox * 20])
        answer = (await server.post(COMPLETIONS, prompt="hi", stop=["<|user|>"], ignore_eos=True)).json()
        assert answer["choices"][0]["text"] == "fox"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(fox) + 1

    run(main())
