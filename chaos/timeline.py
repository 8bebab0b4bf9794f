"""Which faults come when: a function of the suite and the seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from chaos.suite_fields import AtLeastOne, NotNegative, Positive, Section, Share
from chaos.victims import VictimRule


class AllowedFault(Section):
    """One entry of a suite. A parameter may be a value, `{"between": [low, high]}` or `{"one_of": [...]}`."""

    kind: str
    weight: Positive = 1.0
    victims: VictimRule = VictimRule()
    heal_after_s: tuple[NotNegative, NotNegative] = (0.0, 0.0)
    """The time until it is undone is drawn between these."""
    parameters: Mapping[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault of a run."""

    number: int
    at_s: float
    """The time since the faults began, at the earliest: the runner waits until the mesh is whole again after the one
    before, unless the two overlap."""
    kind: str
    victims: VictimRule
    parameters: dict[str, Any]
    heal_after_s: float
    overlaps: bool
    """It comes while the one before still hurts."""


class TimelineRules(Section):
    """How many faults there are, and how close they come."""

    count: AtLeastOne
    spacing_s: tuple[NotNegative, NotNegative] = (1.0, 4.0)
    """The time from one fault (or overlapping pair) to the next is drawn between these."""
    overlap: Share = 0.0
    """This share of faults, in [0, 1], comes while the one before still hurts."""


def make_timeline(seed: int, allowed: Sequence[AllowedFault], rules: TimelineRules) -> list[PlannedFault]:
    """Draws `rules.count` faults in the order of time. Raises ValueError where nothing is allowed.

    Every allowed kind comes once, where the count allows it, and the rest is drawn freely: a short suite should not
    miss a kind by chance.
    """
    if not allowed:
        raise ValueError("a timeline needs at least one allowed fault")
    draw = random.Random(f"{seed}/timeline")
    order = _kinds_in_order(draw, allowed, rules.count)
    planned: list[PlannedFault] = []
    at_s = 0.0
    for number, entry in enumerate(order):
        overlaps = bool(planned) and not planned[-1].overlaps and draw.random() < rules.overlap
        if planned and not overlaps:
            at_s += draw.uniform(*rules.spacing_s)
        planned.append(
            PlannedFault(
                number=number,
                at_s=round(at_s, 3),
                kind=entry.kind,
                victims=entry.victims,
                parameters={name: _value(draw, value) for name, value in sorted(entry.parameters.items())},
                heal_after_s=round(draw.uniform(*entry.heal_after_s), 3),
                overlaps=overlaps,
            )
        )
    return planned


def overlapping_groups(planned: Sequence[PlannedFault]) -> list[list[PlannedFault]]:
    """Groups faults that hurt at the same time; in the order of time."""
    groups: list[list[PlannedFault]] = []
    for fault in planned:
        if fault.overlaps and groups:
            groups[-1].append(fault)
        else:
            groups.append([fault])
    return groups


def _kinds_in_order(draw: random.Random, allowed: Sequence[AllowedFault], count: int) -> list[AllowedFault]:
    each_once = draw.sample(list(allowed), len(allowed))[:count]
    weights = [entry.weight for entry in allowed]
    order = each_once + draw.choices(list(allowed), weights, k=count - len(each_once))
    draw.shuffle(order)
    if order and order[0].victims.rule == "same":
        # No node was hurt before it: it changes places with the first that chooses for itself.
        first = next((n for n, entry in enumerate(order) if entry.victims.rule != "same"), 0)
        order[0], order[first] = order[first], order[0]
    return order


def _value(draw: random.Random, value: Any) -> Any:
    match value:
        case {"between": [int() as low, int() as high]}:
            return draw.randint(low, high)
        case {"between": [int() | float() as low, int() | float() as high]}:
            return round(draw.uniform(low, high), 4)
        case {"one_of": [*values]} if values:
            return draw.choice(values)
        case {"between": _} | {"one_of": _}:
            raise ValueError(f"{value!r}: `between` takes two numbers, `one_of` at least one value")
        case _:
            return value
