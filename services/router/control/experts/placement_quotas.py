"""How many shards each node should hold, in all and of each layer, before anyone asks which ones."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.control.matching import fill


def level(total: int, caps: Sequence[int], favour: Sequence[int]) -> list[int]:
    """`total` over bins of size `caps`, as even as they allow (all of them full if it is too much).

    What does not divide goes one each to the bins with the most `favour`, then to the first.
    """
    return level_groups(total, [caps], [favour], group_limit=sum(caps))[0]


def level_groups(
    total: int, caps: Sequence[Sequence[int]], favour: Sequence[Sequence[int]], group_limit: int
) -> list[list[int]]:
    """As `level`, over groups of bins of which each takes `group_limit` at most. Indexed by [group][bin]."""

    def poured(height: int) -> int:
        return sum(min(group_limit, sum(min(cap, height) for cap in group)) for group in caps)

    low, high = 0, max((cap for group in caps for cap in group), default=0)
    while low < high:  # the greatest height that does not take more than there is
        middle = (low + high + 1) // 2
        if poured(middle) <= total:
            low = middle
        else:
            high = middle - 1
    quotas: list[list[int]] = []
    for group, group_favour in zip(caps, favour, strict=True):
        quota = [min(cap, low) for cap in group]
        quotas.append(quota if sum(quota) <= group_limit else level(group_limit, group, group_favour))
    left = total - sum(map(sum, quotas))
    order = sorted(
        (-favour[g][b], g, b) for g, group in enumerate(caps) for b, cap in enumerate(group) if cap > quotas[g][b]
    )
    for _, g, b in order:
        if left > 0 and sum(quotas[g]) < group_limit:
            quotas[g][b] += 1
            left -= 1
    return quotas


def spread(
    rows: Sequence[int], columns: Sequence[int], weights: Sequence[int], current: Sequence[Sequence[int]]
) -> list[list[int]]:
    """A table of whole numbers with these sums, each entry row * weight / sum(weights) rounded down or up.

    sum(rows) == sum(columns); each column is about its weight's part of that. With `weights` equal to `columns` such a
    table exists always (the shares themselves are a flow of the rounding network); else an entry may have to be one
    more. Of the entries that may be rounded up, those whose `current` value is above the share go first.
    """
    total = max(1, sum(weights))
    table = [[row * weight // total for weight in weights] for row in rows]
    limits = [[int(row * weight % total > 0) for weight in weights] for row in rows]
    needed = [row - sum(entries) for row, entries in zip(rows, table, strict=True)]
    room = [column - sum(entries[c] for entries in table) for c, column in enumerate(columns)]
    extra = [[0] * len(columns) for _ in rows]
    for r in range(len(rows)):
        for c in range(len(columns)):
            if current[r][c] > table[r][c] and limits[r][c] and needed[r] > 0 and room[c] > 0:
                extra[r][c] = 1
                needed[r] -= 1
                room[c] -= 1
    fill(extra, needed, room, limits)
    fill(extra, needed, room, [[limit + 1 for limit in row] for row in limits])
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(table, extra, strict=True)]
