"""Training and held-out questions share no numbers, no words and no phrasing."""

from __future__ import annotations

import re
from random import Random

import pytest

from compose.demo.held_out import Split, hash_percent
from compose.demo.phrasing import expand, of_split
from compose.demo.tasks.catalog import TASKS
from compose.demo.tasks.task import Task
from compose.demo.tasks.words import ENGLISH, draw_word

DRAWS = 1500
# Learned by heart: what is asked is in both splits, how it is asked is not.
BY_PHRASING_ONLY = {"capitals", "abilities"}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_training_never_generates_what_is_held_out(task: Task) -> None:
    random = Random(11)
    training = [task.draw(random, Split.TRAINING) for _ in range(DRAWS)]
    held_out = [task.draw(random, Split.HELD_OUT) for _ in range(DRAWS // 5)]
    for get in (lambda exchange: {exchange.phrasing}, lambda exchange: set(exchange.keys)):
        assert not set.union(*map(get, training)) & set.union(*map(get, held_out))
    assert (task.name in BY_PHRASING_ONLY) == all(exchange.keys == () for exchange in training)


def test_the_split_is_the_same_on_every_machine() -> None:
    assert [hash_percent(key) for key in ("word planet", "adding 47 85")] == [86, 74]


def test_about_a_tenth_of_all_words_is_held_out() -> None:
    held_out = [word for word in ENGLISH if Split.HELD_OUT.allows_content([f"word {word}"])]
    assert 0.05 < len(held_out) / len(ENGLISH) < 0.15
    assert len(ENGLISH) == len(set(ENGLISH))


def test_held_out_words_are_english_and_training_words_also_made_up() -> None:
    random = Random(0)
    assert {draw_word(random, Split.HELD_OUT, 8) for _ in range(100)} <= set(ENGLISH)
    training = {draw_word(random, Split.TRAINING, 8) for _ in range(100)}
    assert training & set(ENGLISH)
    assert training - set(ENGLISH)
    assert all(3 <= len(word) <= 8 and re.fullmatch("[a-z]+", word) for word in training)


def test_a_grammar_expands_to_every_sentence() -> None:
    assert expand("[Add|Sum] {left}[| now].") == ("Add {left}.", "Add {left} now.", "Sum {left}.", "Sum {left} now.")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_held_out_phrasings_have_no_word_that_training_lacks(task: Task) -> None:
    for group in task.phrasings.values():
        training, held_out = (of_split(group, split) for split in (Split.TRAINING, Split.HELD_OUT))
        assert held_out
        assert len(training) > len(held_out)
        heard = set(re.findall("[a-z]+", " ".join(training).lower()))
        assert set(re.findall("[a-z]+", " ".join(held_out).lower())) <= heard
