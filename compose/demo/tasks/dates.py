"""Days between two dates of one year: in one month, or in a month and the next. February has 28 days."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_last_number

MONTHS = (
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
)


def _draw(random: Random, split: Split) -> Content:
    if random.random() < 0.5:
        name, length = random.choice(MONTHS)
        first, last = sorted(random.sample(range(1, length + 1), 2))
        start, end = (first, name), (last, name)
        answer = f"{last} - {first} = {last - first} days."
    else:
        index = random.randrange(len(MONTHS) - 1)
        (name, length), (next_name, next_length) = MONTHS[index], MONTHS[index + 1]
        start, end = (random.randint(1, length), name), (random.randint(1, next_length), next_name)
        # The rest of the first month and the days of the second: short steps that a reader can follow.
        rest = length - start[0]
        answer = f"{length} - {start[0]} = {rest}, {rest} + {end[0]} = {rest + end[0]} days."
    key = f"dates {start[0]} {start[1]} {end[0]} {end[1]}"
    american = random.random() < 0.3
    slots = {"start": _write(start, american), "end": _write(end, american)}
    return Content("between", slots, answer, (key,))


def _write(date: tuple[int, str], american: bool) -> str:
    day, month = date
    return f"{month} {day}" if american else f"{day} {month}"


DATES = Task(
    name="dates",
    phrasings={
        "between": expand(
            "[How many days are there|How many days are|How many days|Count the days|What is the number of days]"
            " [from {start} to {end}|between {start} and {end}]?",
            "[How many days|How long] is it from {start} to {end}?",
            "[Days|Number of days] [from {start} to {end}|between {start} and {end}]?",
        )
    },
    draw_content=_draw,
    read=read_last_number,
    fixed_words=" ".join(f"{name} a {name}" for name, _ in MONTHS) + " = 1 days.",
)
