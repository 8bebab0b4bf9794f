"""Capitals of sixty countries, learned by heart and spelled letter by letter. Held out by phrasing only."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split
from compose.demo.phrasing import expand
from compose.demo.tasks.task import Content, Task, read_text

CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Cyprus": "Nicosia",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Lithuania": "Vilnius",
    "Malta": "Valletta",
    "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Pakistan": "Islamabad",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Serbia": "Belgrade",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "Uruguay": "Montevideo",
    "Vietnam": "Hanoi",
}


def _draw(random: Random, split: Split) -> Content:
    country, capital = random.choice(tuple(CAPITALS.items()))
    return Content("capital", {"country": country}, f"{capital}.")


CAPITAL_PHRASINGS = expand(
    "[What is|What's|Name|Tell me|Give me] the [capital|capital city] of {country}?",
    "[Which city|What city|What] is the capital of {country}?",
    "[What is|Tell me] {country}'s capital?",
    "{country}: capital?",
    "The capital of {country}?",
)

CAPITALS_TASK = Task(
    name="capitals",
    phrasings={"capital": CAPITAL_PHRASINGS},
    draw_content=_draw,
    read=read_text,
)
