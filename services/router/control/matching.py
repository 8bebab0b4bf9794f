"""Items into bins, each item a given number of times, each bin with its own room: a b-matching by augmenting paths.

What is held at the start stays unless a path has to go through it, so a matching that was nearly right changes little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence


def fill(
    held: list[list[int]],
    needed: list[int],
    room: list[int],
    limits: Sequence[Sequence[int]],
    preference: Callable[[int, int], int] = lambda item, bin_index: 0,
) -> None:
    """Place what is needed, in place.

    held[item][bin] times an item is in a bin, at most limits[item][bin]; needed[item] times it is still to be placed;
    room[bin] items still fit. Afterwards needed[item] is above 0 only where no rearrangement makes room for it.
    An item goes to the bin that holds it least often, then to the preferred one (lowest value), then to the emptiest,
    then to the one that shares the fewest items with those that hold it (what a lost bin held is then spread over
    many), then to the first.
    """
    # What was held at the start is moved only where what was added does not suffice.
    together = [[0] * len(room) for _ in room]
    at_start, nothing = [list(row) for row in held], [[0] * len(room) for _ in held]
    for item in range(len(held)):
        counts, item_limits = held[item], limits[item]
        holders = [b for b, count in enumerate(counts) if count]
        while needed[item] > 0:
            candidates = [
                (counts[b], preference(item, b), -room[b], sum(together[b][other] for other in holders), b)
                for b in range(len(room))
                if room[b] > 0 and counts[b] < item_limits[b]
            ]
            if candidates:
                chosen = min(candidates)[-1]
                counts[chosen] += 1
                room[chosen] -= 1
                for other in holders:
                    together[chosen][other] += 1
                    together[other][chosen] += 1
                holders.append(chosen)
            elif not (_augment(held, at_start, item, room, limits) or _augment(held, nothing, item, room, limits)):
                break
            needed[item] -= 1


def place_each(held: list[list[int]], room: list[int], limits: Sequence[Sequence[int]]) -> int | None:
    """Place every item that is in no bin, once, in place; arguments as those of `fill`.

    Returns the first item for which no rearrangement makes room; None: all are placed.
    """
    for item in range(len(held)):
        if not any(held[item]):
            needed = [0] * len(held)
            needed[item] = 1
            fill(held, needed, room, limits)
            if needed[item]:
                return item
    return None


def _augment(
    held: list[list[int]], fixed: Sequence[Sequence[int]], item: int, room: list[int], limits: Sequence[Sequence[int]]
) -> bool:
    """Place `item` once by moving others on, along a shortest chain (breadth first), no link of it fixed."""
    came_from: dict[int, tuple[int, int | None]] = {}  # bin -> (the item that enters it, the bin which that one leaves)
    queue: deque[int] = deque()

    def reach(entering: int, left: int | None) -> None:
        for b in range(len(room)):
            if b not in came_from and held[entering][b] < limits[entering][b]:
                came_from[b] = (entering, left)
                queue.append(b)

    reach(item, None)
    while queue:
        full = queue.popleft()
        if room[full] > 0:
            room[full] -= 1
            target: int | None = full
            while target is not None:
                entering, left = came_from[target]
                held[entering][target] += 1
                if left is not None:
                    held[entering][left] -= 1
                target = left
            return True
        for other in range(len(held)):
            if held[other][full] > fixed[other][full]:
                reach(other, full)
    return False
