"""Expert shards onto expert nodes: every shard somewhere, copies on other hosts, every layer even, few moves.

In three steps. Quotas: how many shards a host and a node take, in all and of each layer; a layer's call waits for its
slowest node, so each layer is as even as the whole. Matching: which shards those are; what a node holds stays there as
far as its quota goes. Order: which copy comes first, so that first copies are even too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from common.errors import CapacityError, ConfigurationError
from common.ids import NodeId
from common.topology import ShardId
from services.router.control.matching import fill, place_each


@dataclass(frozen=True, slots=True)
class ExpertNodeCapacity:
    """What an expert node offers."""

    node_id: NodeId
    host_label: str
    capacity_bytes: int
    numeric_class: str
    experts: frozenset[int] | None = None
    """Whose weights it sees, in all layers; None: of all."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds which shard."""

    owners: Mapping[ShardId, tuple[NodeId, ...]]
    """The owners by shard; the primary first; no node twice."""
    missing_copies: int
    """Copies that were asked for and for which there is no room (or no further node)."""

    def shards_of(self) -> dict[NodeId, frozenset[ShardId]]:
        """Returns the same by node; nodes without shards are left out."""
        shards: dict[NodeId, set[ShardId]] = {}
        for shard, owners in self.owners.items():
            for node_id in owners:
                shards.setdefault(node_id, set()).add(shard)
        return {node_id: frozenset(shards[node_id]) for node_id in sorted(shards)}


def place_shards(
    shards: Sequence[ShardId],
    shard_bytes: int,
    nodes: Sequence[ExpertNodeCapacity],
    copies: int,
    current: Mapping[NodeId, frozenset[ShardId]],
) -> Placement:
    """Finds owners for every shard: one each, then up to `copies`, on different hosts where there are any, no node
    twice, and no node that does not see its weights.

    Even within one shard for each layer and in all, as far as capacities and hosts go (a host that is alone against
    several takes a copy of everything: safety first). `current` is what nodes hold now (nodes that are gone may be
    named): little moves away from it. The answer does not depend on the order of the arguments.
    Raises CapacityError if the nodes cannot hold every shard once, ConfigurationError for copies < 1.
    """
    if copies < 1:
        raise ConfigurationError(f"COPIES is {copies}; at least 1 is needed")
    in_order = sorted(nodes, key=lambda node: (node.host_label, node.node_id))
    placing = _Placing(sorted(set(shards)), shard_bytes, in_order, copies, current)
    placing.check_capacity()
    placing.match_quotas()
    placing.place_the_rest()
    return placing.result()


class _Placing:
    """The state of one call. Nodes are numbered by host, then id, so that a host is a range of them."""

    def __init__(
        self,
        shards: Sequence[ShardId],
        shard_bytes: int,
        nodes: Sequence[ExpertNodeCapacity],
        copies: int,
        current: Mapping[NodeId, frozenset[ShardId]],
    ) -> None:
        self.shards = shards
        self.shard_bytes = shard_bytes
        self.nodes = nodes
        self.wanted_copies = copies
        self.copies = min(copies, len(nodes))
        self.layers = [list(group) for _, group in groupby(shards, key=lambda shard: shard.layer)]
        self.hosts = [
            [index for index, _ in group] for _, group in groupby(enumerate(nodes), key=lambda pair: pair[1].host_label)
        ]
        self.host_of = {index: host for host, members in enumerate(self.hosts) for index in members}
        self.allowed = {
            expert: [int(node.experts is None or expert in node.experts) for node in nodes]
            for expert in {shard.expert for shard in shards}
        }
        """1 where the node sees the expert's weights, by expert and node."""
        known = set(shards)
        self.held_now = [
            {shard for shard in current.get(node.node_id, frozenset()) & known if self._may_hold(index, shard)}
            for index, node in enumerate(nodes)
        ]
        self.owners: dict[ShardId, set[int]] = {shard: set() for shard in shards}
        self.room = [node.capacity_bytes // shard_bytes for node in nodes]
        """How many shards each node has room for."""
        self.num_held = [0] * len(nodes)
        self.num_in_layer: list[Counter[int]] = [Counter() for _ in nodes]

    def check_capacity(self) -> None:
        needed, offered = len(self.shards) * self.shard_bytes, sum(node.capacity_bytes for node in self.nodes)
        if needed > offered:
            raise CapacityError(
                f"the experts need {needed} bytes and {len(self.nodes)} expert nodes offer {offered}: "
                f"{needed - offered} bytes are missing"
            )

    # Quotas and matching

    def match_quotas(self) -> None:
        """What the quotas leave over, `place_the_rest` uses."""
        num_shards = len(self.shards)
        num_of_expert = Counter(shard.expert for shard in self.shards)
        num_allowed = [
            sum(count * self.allowed[expert][index] for expert, count in num_of_expert.items())
            for index in range(len(self.nodes))
        ]
        # Never more of a host than it takes for all copies, so that copies go to other hosts first.
        copies_a_host = -(-self.copies // max(1, len(self.hosts)))
        caps = [[min(num_allowed[index], self.room[index]) for index in host] for host in self.hosts]
        favour = [[len(self.held_now[index]) for index in host] for host in self.hosts]
        total = min(
            self.copies * num_shards, sum(min(copies_a_host * num_shards, sum(host_caps)) for host_caps in caps)
        )
        quotas = level_groups(total, caps, favour, group_limit=copies_a_host * num_shards)
        layer_totals = self._layer_totals(total)
        held_counts = [
            [sum(shard in held for shard in layer) for layer in self.layers] if held else [0] * len(self.layers)
            for held in self.held_now
        ]
        by_host = spread(
            [sum(quota) for quota in quotas],
            layer_totals,
            layer_totals,
            [
                [sum(held_counts[index][layer] for index in host) for layer in range(len(self.layers))]
                for host in self.hosts
            ],
        )
        by_node = [
            spread(quota, host_layers, layer_totals, [held_counts[index] for index in host])
            for quota, host_layers, host in zip(quotas, by_host, self.hosts, strict=True)
        ]
        for layer, shards in enumerate(self.layers):
            node_quotas = [row[layer] for host_rows in by_node for row in host_rows]
            self._match_layer(shards, layer_totals[layer], node_quotas, copies_a_host)

    def _layer_totals(self, total: int) -> list[int]:
        """Returns how many copies each layer gets: first one of every shard, then the others evenly."""
        sizes = [len(layer) for layer in self.layers]
        first = level(total, sizes, [0] * len(sizes))
        more = level(total - sum(first), [size * (self.copies - 1) for size in sizes], [0] * len(sizes))
        return [a + b for a, b in zip(first, more, strict=True)]

    def _match_layer(
        self, shards: Sequence[ShardId], total: int, node_quotas: Sequence[int], copies_a_host: int
    ) -> None:
        """First which hosts hold a shard, then which nodes of them."""
        held = [[int(shard in self.held_now[index]) for index in range(len(self.nodes))] for shard in shards]
        limits = [self.allowed[shard.expert] for shard in shards]
        num_copies = level(total, [min(self.copies, sum(row)) for row in limits], [sum(row) for row in held])
        self._trim(held, num_copies, node_quotas, copies_a_host)

        by_host = [[sum(row[index] for index in host) for host in self.hosts] for row in held]
        host_limits = [[min(copies_a_host, sum(row[index] for index in host)) for host in self.hosts] for row in limits]
        fill(
            by_host,
            [wanted - sum(row) for wanted, row in zip(num_copies, by_host, strict=True)],
            [
                sum(node_quotas[index] for index in host) - sum(row[h] for row in by_host)
                for h, host in enumerate(self.hosts)
            ],
            host_limits,
        )
        for h, host in enumerate(self.hosts):
            self._match_host(shards, host, held, [row[h] for row in by_host], [node_quotas[index] for index in host])

    def _match_host(
        self,
        shards: Sequence[ShardId],
        host: Sequence[int],
        held: Sequence[Sequence[int]],
        wanted: Sequence[int],
        quotas: Sequence[int],
    ) -> None:
        """Which nodes of a host take the copies that are wanted of it."""
        in_host = [[row[index] for index in host] for row in held]
        for row, count in zip(in_host, wanted, strict=True):
            for position in range(len(host)):  # a chain of the host matching may have moved one away
                if sum(row) > count and row[position]:
                    row[position] = 0

        def other_class(item: int, position: int) -> int:
            """A copy is of most use where the bits are the same."""
            holders = {*self.owners[shards[item]], *(host[p] for p, count in enumerate(in_host[item]) if count)}
            classes = {self.nodes[holder].numeric_class for holder in holders}
            return int(bool(classes) and self.nodes[host[position]].numeric_class not in classes)

        fill(
            in_host,
            [count - sum(row) for count, row in zip(wanted, in_host, strict=True)],
            [quota - sum(row[position] for row in in_host) for position, quota in enumerate(quotas)],
            [[self.allowed[shard.expert][index] for index in host] for shard in shards],
            other_class,
        )
        for shard, row in zip(shards, in_host, strict=True):
            for position, count in enumerate(row):
                if count:
                    self._add(shard, host[position])

    def _trim(
        self, held: list[list[int]], num_copies: Sequence[int], node_quotas: Sequence[int], copies_a_host: int
    ) -> None:
        """Cut what is held down to the quotas; shards that have too many copies go first."""
        num_held = [sum(row[index] for row in held) for index in range(len(self.nodes))]

        def drop(row: list[int], index: int) -> None:
            row[index] = 0
            num_held[index] -= 1

        def drop_beyond(count: int, row: list[int], indexes: Sequence[int]) -> None:
            """From the nodes that are fullest against their quota."""
            if sum(row[index] for index in indexes) > count:
                holders = sorted((i for i in indexes if row[i]), key=lambda i: (node_quotas[i] - num_held[i], i))
                for index in holders[: len(holders) - count]:
                    drop(row, index)

        everywhere = range(len(self.nodes))
        for row, wanted in zip(held, num_copies, strict=True):
            for host in self.hosts:
                if len(host) > copies_a_host:
                    drop_beyond(copies_a_host, row, host)
            drop_beyond(wanted, row, everywhere)
        for index in range(len(self.nodes)):
            # A shard that has lost no copy yet can go on to a node that lacks one; two lost copies would need two.
            rows = sorted(
                (position for position, row in enumerate(held) if row[index]),
                key=lambda position: (num_copies[position] - sum(held[position]), position),
            )
            for position in rows[: max(0, num_held[index] - node_quotas[index])]:
                drop(held[position], index)

    # What quotas left over: hosts with little room, nodes that do not see everything

    def place_the_rest(self) -> None:
        """Owners for shards that have none, then missing copies, wherever there is room."""
        for num_copies in range(1, self.copies + 1):
            for shard in self.shards:
                if len(self.owners[shard]) < num_copies:
                    node = self._best_node_for(shard)
                    if node is None and num_copies == 1:
                        node = self._make_room_for(shard)
                    if node is not None:
                        self._add(shard, node)
                    elif num_copies == 1:
                        self._rearrange()

    def _best_node_for(self, shard: ShardId) -> int | None:
        """Returns a node with room: on a host without it, then the least loaded one."""
        owners = self.owners[shard]
        hosts = {self.host_of[owner] for owner in owners}
        candidates = [
            (
                self.host_of[index] in hosts,
                self.num_in_layer[index][shard.layer],
                self.num_in_layer[index].total(),
                index,
            )
            for index in range(len(self.nodes))
            if index not in owners and self._may_hold(index, shard) and self.num_held[index] < self.room[index]
        ]
        return min(candidates)[3] if candidates else None

    def _make_room_for(self, shard: ShardId) -> int | None:
        """Returns a node that gives up a further copy of another shard for a shard that no node holds."""
        for index in (index for index in range(len(self.nodes)) if self._may_hold(index, shard)):
            spare = [other for other, owners in self.owners.items() if index in owners and len(owners) > 1]
            if spare:
                self._remove(spare[0], index)
                return index
        return None

    def _rearrange(self) -> None:
        """First copies only, each moved on along a chain of nodes that see its weights until every shard has one.

        Raises CapacityError where no arrangement has room for every shard.
        """
        room = list(self.room)
        held = [[0] * len(self.nodes) for _ in self.shards]
        for shard, row in zip(self.shards, held, strict=True):
            owners = sorted(self.owners[shard], key=lambda index: (shard not in self.held_now[index], index))
            for index in [index for index in owners if room[index] > 0][:1]:
                row[index] = 1
                room[index] -= 1
        left_over = place_each(held, room, [self.allowed[shard.expert] for shard in self.shards])
        if left_over is not None:
            self._refuse(self.shards[left_over])
        for shard, row in zip(self.shards, held, strict=True):
            for index in list(self.owners[shard]):
                self._remove(shard, index)
            self._add(shard, row.index(1))

    def _refuse(self, shard: ShardId) -> NoReturn:
        able = [node.capacity_bytes for index, node in enumerate(self.nodes) if self._may_hold(index, shard)]
        nodes = "nodes offer" if len(able) == len(self.nodes) else "nodes that see its weights offer"
        raise CapacityError(
            f"an expert shard of {self.shard_bytes} bytes fits no node: the experts need "
            f"{len(self.shards) * self.shard_bytes} bytes, {len(able)} {nodes} {sum(able)}, "
            f"the largest {max(able, default=0)}"
        )

    def _may_hold(self, index: int, shard: ShardId) -> bool:
        return self.allowed[shard.expert][index] == 1

    def _add(self, shard: ShardId, index: int) -> None:
        self.owners[shard].add(index)
        self.num_held[index] += 1
        self.num_in_layer[index][shard.layer] += 1

    def _remove(self, shard: ShardId, index: int) -> None:
        self.owners[shard].remove(index)
        self.num_held[index] -= 1
        self.num_in_layer[index][shard.layer] -= 1

    def result(self) -> Placement:
        ordered = order_copies({shard: sorted(owners) for shard, owners in self.owners.items()}, len(self.nodes))
        owners = {shard: tuple(self.nodes[index].node_id for index in indexes) for shard, indexes in ordered.items()}
        return Placement(owners, sum(self.wanted_copies - len(indexes) for indexes in ordered.values()))


def level(total: int, caps: Sequence[int], favour: Sequence[int]) -> list[int]:
    """Returns `total` over bins of size `caps`, as even as they allow (all of them full if it is too much).

    What does not divide goes one each to the bins with the most `favour`, then to the first.
    """
    return level_groups(total, [caps], [favour], group_limit=sum(caps))[0]


def level_groups(
    total: int, caps: Sequence[Sequence[int]], favour: Sequence[Sequence[int]], group_limit: int
) -> list[list[int]]:
    """Does as `level`, over groups of bins of which each takes `group_limit` at most. Indexed by [group][bin]."""

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
    """Returns a table of whole numbers with these sums, each entry row * weight / sum(weights) rounded down or up.

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


def order_copies(owners: Mapping[ShardId, Sequence[int]], num_nodes: int) -> dict[ShardId, list[int]]:
    """Returns the owners of each shard, the primary first, the others by how often they stand at that place."""
    totals = [0] * num_nodes
    ordered: dict[ShardId, list[int]] = {}
    for _, group in groupby(sorted(owners), key=lambda shard: shard.layer):
        layer = list(group)
        primaries = _even_primaries([owners[shard] for shard in layer], totals)
        for shard, primary in zip(layer, primaries, strict=True):
            totals[primary] += 1
            ordered[shard] = [primary]
    for place in range(1, max((len(nodes) for nodes in owners.values()), default=0)):
        counts = [0] * num_nodes
        for shard, chosen in ordered.items():
            left = [node for node in owners[shard] if node not in chosen]
            if len(chosen) == place and left:
                pick = min(left, key=lambda node: (counts[node], node))
                counts[pick] += 1
                chosen.append(pick)
    return ordered


def _even_primaries(owners: Sequence[Sequence[int]], totals: Sequence[int]) -> list[int]:
    """Returns one owner for each shard of a layer. `totals` (of the layers before) decides between equals."""
    counts = [0] * len(totals)
    primaries: list[int] = []
    for nodes in owners:
        pick = min(nodes, key=lambda node: (counts[node], totals[node], node))
        counts[pick] += 1
        primaries.append(pick)
    while _shift_one(owners, primaries, counts, totals):
        pass  # each shift lowers the sum of squares (or, between equals, that of the totals), so this ends
    return primaries


def _shift_one(owners: Sequence[Sequence[int]], primaries: list[int], counts: list[int], totals: Sequence[int]) -> bool:
    """Move one first copy from a fuller to an emptier node, along a chain of shards that both ends of a link own."""
    first_copies: list[list[int]] = [[] for _ in counts]
    for shard, primary in enumerate(primaries):
        first_copies[primary].append(shard)
    for start in sorted(range(len(counts)), key=lambda node: (-counts[node], -totals[node], node)):
        came_from: dict[int, int] = {}  # node -> the shard that moves to it
        queue = deque([start])
        seen = {start}
        while queue:
            node = queue.popleft()
            gain = counts[start] - counts[node]
            if gain > 1 or (gain == 1 and totals[start] > totals[node]):
                counts[start] -= 1
                counts[node] += 1
                while node != start:
                    shard = came_from[node]
                    primaries[shard], node = node, primaries[shard]
                return True
            for shard in first_copies[node]:
                for other in owners[shard]:
                    if other not in seen:
                        seen.add(other)
                        came_from[other] = shard
                        queue.append(other)
    return False
