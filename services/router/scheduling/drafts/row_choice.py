"""How many drafts each sequence of a step gets: what makes the most tokens of its time. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN = 1.03
"""So many times faster than without drafts they must seem: what is measured is never exact, nor is what is gained by
planning ahead once more."""
LOOKED_AT_ROWS = 16
"""Up to so many rows each number is looked at, beyond that every eighth: the curve is flat there."""


def choose_rows(
    num_rows: int,
    gains: Sequence[Sequence[float]],
    most: int,
    undrafted_s: float,
    drafted_s: Callable[[int], float],
) -> list[int]:
    """Returns how many drafts each sequence gets that has a guess, `most` of all at most, in a step that makes a token
    in each of `num_rows` rows without them.

    `gains`: for each such sequence, what each of its drafts is expected to add: how likely it and all before it are
    right, so it descends. `undrafted_s`: the time of that step without any draft. `drafted_s`: that of
    a step of so many rows. Of numbers of drafts, those with the highest gains are the best, so only their sum is to be
    chosen; all of them are looked at, since once most experts are read, further rows cost little.
    """
    ordered = sorted(((gain, -place) for place, of_one in enumerate(gains) for gain in of_one), reverse=True)[:most]
    best_rate, best = MARGIN * num_rows / undrafted_s, 0
    expected = float(num_rows)
    for number, (gain, _) in enumerate(ordered, start=1):
        expected += gain
        size = num_rows + number
        if size > LOOKED_AT_ROWS and size % 8 and number < len(ordered):
            continue
        rate = expected / drafted_s(size)
        if rate > best_rate:
            best_rate, best = rate, number
    counts = [0] * len(gains)
    for _, place in ordered[:best]:
        counts[-place] += 1
    return counts
