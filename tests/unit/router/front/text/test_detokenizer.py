from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.errors import ExecutionError
from services.router.front.text.detokenizer import (
    ByteLevelDetokenizer,
    Vocabulary,
    WindowDetokenizer,
    create_detokenizer,
)
from services.router.front.text.tokenizer import TextTokenizer
from tests.support.checkpoints.byte_runs import text_of_run
from tests.support.checkpoints.tiny_tokenizers import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_tokenizer_directory,
)
from tests.support.front.journalling_front import COMPLETIONS, RESUMABLE, Server, run

TEXT = "The quick brown fox, 你好 👩‍🚀!"
MANY_EXAMPLES = settings(max_examples=150, deadline=None)
NO_TEXT = 3
"""A token of a model that has such an answer; stripping its end is what the library does not bear."""


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["level", "fallback"])
def test_bytes_of_the_tokens_of_a_text_are_the_texts(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(vocabulary.token_bytes(token_id) for token_id in token_ids).decode().lstrip() == TEXT


def test_kind_is_read_off_the_decoder() -> None:
    assert Vocabulary(byte_level_tokenizer()).is_byte_level
    assert not Vocabulary(byte_fallback_tokenizer()).is_byte_level


def test_only_special_tokens_and_ids_without_a_token_are_skipped() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<note>"])
    vocabulary = Vocabulary(tokenizer)
    note = tokenizer.token_to_id("<note>")
    assert note is not None
    assert [vocabulary.is_skipped(token_id) for token_id in (2, 50, note, note + 1)] == [True, False, False, True]


def test_a_byte_is_a_byte_only_with_byte_fallback() -> None:
    fallback = Vocabulary(byte_fallback_tokenizer())
    assert fallback.is_fallback_byte(3 + 0xE2)
    assert fallback.token_bytes(3 + 0xE2) == b"\xe2"
    assert not fallback.is_fallback_byte(300)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<0xE2>"])
    token_id = tokenizer.token_to_id("<0xE2>")
    assert token_id is not None
    level = Vocabulary(tokenizer)
    assert not level.is_fallback_byte(token_id)
    assert level.token_bytes(token_id) == b"<0xE2>"


def test_special_tokens_show_as_they_are_written() -> None:
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        assert Vocabulary(tokenizer).token_text(2) == "</s>"


def metaspace_tokenizer() -> Tokenizer:
    """Words with a mark for the space, by the decoder of that name."""
    vocabulary = {token: token_id for token_id, token in enumerate(("▁", "▁a", "b", "▁▁", "c▁", "d"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="d"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_tokenizer(*words: str) -> Tokenizer:
    """As Mixtral's, with these words as tokens."""
    tokenizer = byte_fallback_tokenizer()
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {word: 420 + rank for rank, word in enumerate(words)}
    return Tokenizer.from_str(json.dumps(content))


TOKENIZERS = {
    "byte_level": byte_level_tokenizer(),
    "byte_fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
}
TOKENIZERS["byte_level"].add_tokens(["<note>", "größe"])
TOKENIZERS["byte_fallback"].add_tokens(["<note>"])
PLACEHOLDER = "\ue000"
TOKENIZERS["byte_fallback"].add_tokens([AddedToken(PLACEHOLDER, normalized=False)])
PLACEHOLDER_ID = TOKENIZERS["byte_fallback"].get_vocab_size() - 1
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
NAMES = sorted(TOKENIZERS)


def pieces_of(name: str, token_ids: list[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = create_detokenizer(VOCABULARIES[name], prompt)
    return [*[detokenizer.push(token_id) for token_id in token_ids], detokenizer.flush()]


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    # Some ids past the end: an embedding may have more rows than there are tokens.
    ids = st.integers(0, TOKENIZERS[name].get_vocab_size() + 3).filter(lambda token_id: token_id != PLACEHOLDER_ID)
    if name != "byte_fallback":
        return st.lists(ids, max_size=40)
    # Bytes of whole texts too: at random they hardly ever make a character.
    runs = st.text(max_size=4).map(lambda text: [3 + value for value in text.encode()])
    return st.lists(ids.map(lambda token_id: [token_id]) | runs, max_size=20).map(
        lambda parts: list(itertools.chain.from_iterable(parts))
    )


def decoded(name: str, token_ids: list[int]) -> str:
    """What the library makes of all ids at once; but of a run of bytes that is not valid UTF-8, characters stay. Such a
    run is decoded as a placeholder, which is then replaced by its text."""
    tokenizer, vocabulary = TOKENIZERS[name], VOCABULARIES[name]
    shown = [token_id for token_id in token_ids if not vocabulary.is_skipped(token_id)]
    ids: list[int] = []
    faulty: list[str] = []
    for is_run, group in itertools.groupby(shown, vocabulary.is_fallback_byte):
        run = list(group)
        text = text_of_run(b"".join(map(vocabulary.token_bytes, run))) if is_run else ""
        if "\ufffd" in text:
            if not ids and text.startswith(" ") and name == "byte_fallback":
                text = text[1:]  # the decoder strips the first blank
            faulty.append(text)
            ids.append(PLACEHOLDER_ID)
        else:
            ids += run
    first, *rest = tokenizer.decode(ids).split(PLACEHOLDER)
    return first + "".join(text + piece for text, piece in zip(faulty, rest, strict=True))


@pytest.mark.parametrize("name", NAMES)
@MANY_EXAMPLES
@given(data=st.data())
def test_pieces_of_any_ids_make_what_decode_makes(name: str, data: st.DataObject) -> None:
    token_ids = data.draw(ids_of(name))
    assert "".join(pieces_of(name, token_ids)) == decoded(name, token_ids)


@pytest.mark.parametrize("name", NAMES)
@MANY_EXAMPLES
@given(data=st.data())
def test_an_answer_is_what_decode_adds_to_the_prompt(name: str, data: st.DataObject) -> None:
    prompt, answer = data.draw(ids_of(name)), data.draw(ids_of(name))
    pieces = pieces_of(name, answer, prompt)
    held = create_detokenizer(VOCABULARIES[name], prompt).flush()
    assert decoded(name, prompt).removesuffix(held) + "".join(pieces) == decoded(name, prompt + answer)


@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
@MANY_EXAMPLES
@given(first=st.text(min_size=1, max_size=12), second=st.text(max_size=12))
def test_prompt_and_answer_of_a_text_cut_anywhere_join_to_it(name: str, first: str, second: str) -> None:
    token_ids = TOKENIZERS[name].encode(first + second, add_special_tokens=False).ids
    whole = TOKENIZERS[name].decode(token_ids)
    for cut in range(len(token_ids) + 1):
        prompt = TOKENIZERS[name].decode(token_ids[:cut])
        held = create_detokenizer(VOCABULARIES[name], token_ids[:cut]).flush()
        assert prompt.endswith(held)
        answer = "".join(pieces_of(name, token_ids[cut:], token_ids[:cut]))
        if "\ufffd" not in prompt.removesuffix(
            held
        ):  # else characters before a fault were lost to the prompt's own decode
            assert prompt.removesuffix(held) + answer == whole


def test_an_answer_keeps_the_blank_that_a_decoder_strips_at_the_start() -> None:
    tokenizer = word_tokenizer("▁there", "▁were", "▁many")
    there, were, many = (tokenizer.token_to_id(token) for token in ("▁there", "▁were", "▁many"))
    assert there is not None
    vocabulary = Vocabulary(tokenizer)
    for prompt, wanted in (([1, there], [" were", " many"]), ([1], ["were", " many"]), ([], ["were", " many"])):
        detokenizer = create_detokenizer(vocabulary, prompt)
        assert [detokenizer.push(were or 0), detokenizer.push(many or 0)] == wanted


@pytest.mark.parametrize("end", ["", "é", "👩"])
@pytest.mark.parametrize("cut", range(4))
def test_a_prompt_of_many_bytes_costs_little_and_its_last_character_comes_whole(end: str, cut: int) -> None:
    decoded_tokens: list[int] = []

    class CountingVocabulary(Vocabulary):
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            decoded_tokens.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    data = ("你" * 20_000 + end).encode()
    ids = [3 + value for value in data]
    detokenizer = create_detokenizer(CountingVocabulary(TOKENIZERS["byte_fallback"]), ids[: len(ids) - cut])
    assert sum(decoded_tokens) < 50
    text = "".join(detokenizer.push(token_id) for token_id in ids[len(ids) - cut :])
    whole = data[: len(data) - cut].decode(errors="ignore")
    assert text == data.decode()[len(whole) :]


def test_a_character_that_the_prompt_began_comes_whole_with_the_answer() -> None:
    for name in ("byte_level", "byte_fallback"):
        token_ids = TOKENIZERS[name].encode("你", add_special_tokens=False).ids
        answer = pieces_of(name, token_ids[-1:], token_ids[:-1])
        assert "".join(answer) == "你"


def test_a_character_of_bytes_is_shown_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    detokenizer = create_detokenizer(VOCABULARIES["byte_fallback"])
    ids = [tokenizer.token_to_id(f"<0x{value:02X}>") or 0 for value in "a\n👩\nü".encode()]
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "\n", "", "", "", "👩", "\n", "", "ü"]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("start", [b"", b"a", b"\xc3\xa9", b" "])
@pytest.mark.parametrize("fault", [b"\xff", b"\xf0\x9f", b"\xe2\x82\xe2", b"\x80\x80"])
def test_a_line_break_of_bytes_after_a_fault_is_shown_at_once(start: bytes, fault: bytes) -> None:
    detokenizer = create_detokenizer(VOCABULARIES["byte_fallback"], [260])
    pieces = [detokenizer.push(3 + value) for value in start + fault + b"\n"]
    assert "".join(pieces[:-1]).startswith(start.decode())
    assert pieces[-1].endswith("\n")
    assert detokenizer.push(3 + ord("\n")) == "\n"
    assert "".join(pieces).count("\ufffd") == len(fault)


def test_what_was_shown_of_a_run_of_bytes_is_not_taken_back() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    detokenizer = create_detokenizer(VOCABULARIES["byte_fallback"])
    ids = [tokenizer.token_to_id(f"<0x{value:02X}>") or 0 for value in b"a\xc3\xff\xc3\xbc"]
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "\ufffd\ufffd", "", "ü"]


@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
@MANY_EXAMPLES
@given(text=st.text(max_size=30))
def test_pieces_of_a_text_never_hold_half_a_character(name: str, text: str) -> None:
    token_ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    pieces = pieces_of(name, token_ids)
    assert "".join(pieces) == TOKENIZERS[name].decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@MANY_EXAMPLES
@given(st.lists(st.integers(3, 258), max_size=16), st.integers(259, 419))
def test_a_fault_in_a_run_of_bytes_spoils_no_character_beside_it(byte_ids: list[int], word: int) -> None:
    token_ids = [word, *byte_ids, word, *byte_ids]
    assert "".join(pieces_of("byte_fallback", token_ids)) == decoded("byte_fallback", token_ids)


def test_window_also_serves_a_byte_level_decoder_within_a_sequence() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    detokenizer = create_detokenizer(Vocabulary(tokenizer))
    assert isinstance(detokenizer, WindowDetokenizer)
    text = "Grüße 你好 👩‍🚀!"
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text).ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_characters_come_out_as_soon_as_they_are_whole() -> None:
    detokenizer = create_detokenizer(VOCABULARIES["byte_level"])
    assert isinstance(detokenizer, ByteLevelDetokenizer)
    token_ids = TOKENIZERS["byte_level"].encode("é👩").ids
    shown = ""
    for position, token_id in enumerate(token_ids, start=1):
        shown += detokenizer.push(token_id)
        data = b"".join(VOCABULARIES["byte_level"].token_bytes(each) for each in token_ids[:position])
        assert shown == data.decode(errors="ignore")


@pytest.mark.parametrize("token", ["▁", "<0xE2>", "<0x41>"])
def test_a_loop_of_one_token_costs_linear_time(token: str) -> None:
    vocabulary = VOCABULARIES["byte_fallback"]
    token_id = TOKENIZERS["byte_fallback"].token_to_id(token)
    assert token_id is not None
    calls: list[int] = []

    class CountingVocabulary(Vocabulary):
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            calls.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    counting = CountingVocabulary(TOKENIZERS["byte_fallback"])
    detokenizer = create_detokenizer(counting)
    for _ in range(3000):
        detokenizer.push(token_id)
    detokenizer.flush()
    assert sum(calls) <= 3000 * 20
    assert vocabulary.has_byte_fallback


@pytest.fixture(scope="module")
def stripping(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "</s>": 2, "": NO_TEXT, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Strip(content=" ", left=0, right=1)
    directory: Path = tmp_path_factory.mktemp("stripping")
    return TextTokenizer.from_directory(write_tokenizer_directory(directory, words))


def test_a_panic_is_an_error_of_ours(stripping: TextTokenizer) -> None:
    for skips in (True, False):
        with pytest.raises(ExecutionError, match="the tokenizer of this checkpoint failed"):
            stripping.vocabulary.decode([NO_TEXT], skip_special_tokens=skips)


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
