"""Any text comes back; arguments come as characters, the words around them as one token each."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compose.demo.held_out import Split
from compose.demo.tasks.catalog import TASKS
from compose.demo.tasks.task import Task
from compose.demo.tasks.words import ENGLISH
from compose.demo.tokenizer import SPECIAL_TOKENS, build_tokenizer

TOKENIZER = build_tokenizer(TASKS)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_questions_and_answers_come_back(task: Task) -> None:
    random = Random(5)
    for split in Split:
        for _ in range(50):
            exchange = task.draw(random, split)
            for text in (exchange.question, exchange.answer):
                assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_a_word_that_is_asked_about_comes_as_letters() -> None:
    assert TOKENIZER.encode("Reverse the word planet").tokens == ["Reverse", "Ġthe", "Ġword", "Ġ", *"planet"]
    assert TOKENIZER.encode("47 + 285").tokens == ["4", "7", "Ġ", "+", "Ġ", "2", "8", "5"]


def test_no_word_of_the_list_is_a_token() -> None:
    vocabulary = TOKENIZER.get_vocab()
    assert [word for word in ENGLISH if word in vocabulary or f"Ġ{word}" in vocabulary] == []


def test_the_same_tasks_give_the_same_tokenizer() -> None:
    assert build_tokenizer(TASKS).to_str() == TOKENIZER.to_str()
