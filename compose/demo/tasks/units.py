"""Converting units: metric ones by shifting digits, up to 999 of them, and times up to 12 by heart."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.arithmetic import draw_number
from compose.demo.tasks.task import Content, Task, read_last_number

METRIC = (
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("tons", "kilograms", 1000),
    ("liters", "milliliters", 1000),
)
TIMES = (
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("years", "months", 12),
)
MAX_TIME = 12
MAX_DIGITS = 3


def _draw(random: Random, split: Split) -> Content:
    if random.random() < 0.3:
        large, small, factor = random.choice(TIMES)
        number = random.randint(2, MAX_TIME)
        # A multiplication table is known or not: only its phrasing can be held out.
        return _content((number, large), (number * factor, small), ())
    large, small, factor = random.choice(METRIC)
    number = max(2, draw_number(random, MAX_DIGITS))
    keys = (f"units {number} {large} {small}",)
    if random.random() < 0.4:
        return _content((number * factor, small), (number, large), keys)
    return _content((number, large), (number * factor, small), keys)


def _content(given: tuple[int, str], asked: tuple[int, str], keys: tuple[str, ...]) -> Content:
    slots = {"number": str(given[0]), "unit": given[1], "asked": asked[1]}
    return Content("convert", slots, f"{given[0]} {given[1]} = {asked[0]} {asked[1]}.", keys)


UNITS = Task(
    name="units",
    phrasings={
        "convert": expand(
            "[Convert|Change|Turn] {number} {unit} [to|into] {asked}.",
            "How many {asked} are [|there in |in ]{number} {unit}?",
            "[What is|What are|How much is|Give me] {number} {unit} in {asked}?",
            "{number} {unit} in {asked}?",
        )
    },
    draw_content=_draw,
    read=read_last_number,
    fixed_words=" ".join(f"{large} {small}" for large, small, _ in METRIC + TIMES) + " a tons. = 1",
)
