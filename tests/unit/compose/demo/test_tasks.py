"""Every answer is computed here a second time, from the question as it stands and by other means."""

from __future__ import annotations

import datetime
import re
from itertools import pairwise
from random import Random

import pytest

from compose.demo.held_out import Split
from compose.demo.tasks.abilities import ABILITIES, GREETING
from compose.demo.tasks.capitals import CAPITALS
from compose.demo.tasks.catalog import TASKS, WEIGHTS
from compose.demo.tasks.refusing import REFUSAL
from compose.demo.tasks.task import Exchange, Task

DRAWS = 300
MONTH_NAMES = [datetime.date(2023, month, 1).strftime("%B") for month in range(1, 13)]
IN_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
IN_SMALLEST = {
    **{name: ("time", seconds) for name, seconds in IN_SECONDS.items()},
    **{"months": ("calendar", 1), "years": ("calendar", 12)},
    **{"millimeters": ("length", 1), "centimeters": ("length", 10), "meters": ("length", 1000)},
    **{"kilometers": ("length", 1000000), "milliliters": ("volume", 1), "liters": ("volume", 1000)},
    **{"grams": ("mass", 1), "kilograms": ("mass", 1000), "tons": ("mass", 1000000)},
}


def task_named(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def draws(name: str) -> list[Exchange]:
    task, random = task_named(name), Random(7)
    return [task.draw(random, split) for split in Split for _ in range(DRAWS)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def argument_word(exchange: Exchange) -> str:
    """The word asked about: what stands in the question where the phrasing is open."""
    pattern = re.escape(exchange.phrasing.rstrip("?.")).replace(r"\{word\}", "([a-z]+)").replace(r"\{letter\}", "[a-z]")
    found = re.search(pattern, exchange.question, re.IGNORECASE)
    assert found, exchange
    return found.group(1)


def test_every_task_has_a_weight_and_a_name_of_its_own() -> None:
    assert [task.name for task in TASKS] == list(WEIGHTS)


def test_a_sum_is_the_sum_of_the_numbers_in_the_question() -> None:
    for exchange in draws("adding"):
        assert numbers(exchange.answer)[-1] == sum(numbers(exchange.question)), exchange


def test_a_difference_is_that_of_the_numbers_in_the_question() -> None:
    for exchange in draws("subtracting"):
        left, right = numbers(exchange.question)
        assert numbers(exchange.answer)[-1] == abs(left - right), exchange


def test_the_number_named_by_a_comparison_is_the_one_asked_for() -> None:
    for exchange in draws("comparing"):
        asks_for_more = bool(re.search("large|big|great", exchange.question))
        expected = sorted(numbers(exchange.question))[-1 if asks_for_more else 0]
        assert numbers(exchange.answer)[-1] == expected, exchange


def test_sorted_words_are_those_of_the_question_in_order() -> None:
    for exchange in draws("sorting"):
        words = exchange.answer.rstrip(".").split(", ")
        assert all(first < second for first, second in pairwise(words)), exchange
        assert len(words) == 3
        assert set(words) <= set(re.findall("[a-z]+", exchange.question.lower())), exchange


def test_a_reversed_word_read_from_its_end_is_the_word() -> None:
    for exchange in draws("reversing"):
        assert "".join(reversed(exchange.answer)) == argument_word(exchange), exchange


def test_a_spelled_word_without_hyphens_is_the_word() -> None:
    for exchange in draws("spelling"):
        assert exchange.answer.split("-") == [*argument_word(exchange)], exchange


def test_counted_letters_are_in_the_word_so_often() -> None:
    for exchange in draws("counting letters"):
        word = argument_word(exchange)
        letter = re.search(r"(?:is|does|letter|many) (?:the letter )?([a-z]) ", exchange.question)
        expected = len(re.findall(letter.group(1), word)) if letter else len(word)
        assert numbers(exchange.answer)[-1] == expected, exchange
        assert re.findall("[a-z]", exchange.answer.split(":")[0]) == [*word]


def test_a_capital_is_that_of_the_table() -> None:
    assert len(CAPITALS) == len(set(CAPITALS.values())) == 60
    for exchange in draws("capitals"):
        (country,) = [name for name in CAPITALS if name.lower() in exchange.question.lower()]
        assert exchange.answer == CAPITALS[country] + ".", exchange


def test_converted_units_are_the_same_amount() -> None:
    for exchange in draws("units"):
        left, right = exchange.answer.rstrip(".").split(" = ")
        amounts = []
        for side in (left, right):
            number, unit = side.split(" ")
            quantity, size = IN_SMALLEST[unit]
            amounts.append((quantity, int(number) * size))
        assert amounts[0] == amounts[1], exchange
        assert left.split(" ")[0] in exchange.question


def test_days_between_dates_are_those_of_the_calendar() -> None:
    for exchange in draws("dates"):
        dates = [
            datetime.date(2023, MONTH_NAMES.index(month or month_first) + 1, int(day or day_last))
            for day, month, month_first, day_last in re.findall(
                r"(\d+) ([A-Z][a-z]+)|([A-Z][a-z]+) (\d+)", exchange.question
            )
        ]
        first, last = dates
        assert numbers(exchange.answer)[-1] == (last - first).days, exchange


def test_a_continued_sequence_keeps_its_step() -> None:
    for exchange in draws("sequences"):
        sequence = numbers(exchange.question) + numbers(exchange.answer)
        assert len(sequence) == 7
        assert len({second - first for first, second in pairwise(sequence)}) == 1, exchange


def test_abilities_and_refusals_are_fixed_sentences() -> None:
    assert {exchange.answer for exchange in draws("abilities")} == {ABILITIES, GREETING}
    assert {exchange.answer for exchange in draws("refusing")} == {REFUSAL}


def test_no_made_up_country_is_in_the_table() -> None:
    for exchange in draws("refusing"):
        assert not any(f" {country} " in f" {exchange.question.rstrip('?.')} " for country in CAPITALS), exchange


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_right_answer_is_taken_and_a_wrong_one_is_not(task: Task) -> None:
    random = Random(3)
    exchange = task.draw(random, Split.TRAINING)
    assert task.is_right(exchange.answer, f" {exchange.answer}\n")
    assert not task.is_right(exchange.answer, "")
    other = (
        next(
            other for other in iter(lambda: task.draw(random, Split.TRAINING), None) if other.answer != exchange.answer
        )
        if task.name != "refusing"
        else Exchange(task.name, "", "Yes.", "", ())
    )
    assert task.is_right(exchange.answer, other.answer) == (task.read(exchange.answer) == task.read(other.answer))
