"""From the shards that nodes have to those that they should have, without a moment in which one is served by nobody.

N nodes in the order of their ids, P shards in the order of (layer, expert, slice), C copies. All of it is done on whole
tables: with 64 nodes and 15,000 shards a turn of the mesh thread has a few milliseconds for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.wire.array import BoolArray, Int32Array, Int64Array

NOBODY = -1


@dataclass(frozen=True, slots=True)
class PlacementTarget:
    """Where shards are to be in the end."""

    owners: Int64Array
    """[C, P]: the node at each place among a shard's owners, NOBODY where there is none."""
    goals: BoolArray
    """[N, P]: the same by node."""
    is_named: BoolArray
    """[P]: which shards the model has; others are unloaded."""
    is_settled: bool
    """False: a newer placement is to come, for other nodes than this one. Nobody unloads anything until then, but to
    make room: it might have to load it again."""


@dataclass(frozen=True, slots=True)
class ShardAssignment:
    """What the nodes are to hold next, and where calls may go now."""

    shards: BoolArray
    """[N, P]: what each node is to hold: it unloads the rest first, then loads what is new."""
    owners: Int32Array
    """[C, P]: 1 + the node that may be asked now, in order, 0 for none: ready copies that stay, as the placement orders
    them, then those that go."""
    orphans: BoolArray
    """[P]: shards that nobody can serve now."""


def aim(owners: Int64Array, num_nodes: int, is_named: BoolArray, is_settled: bool) -> PlacementTarget:
    """Returns the target with these owners [C, P]."""
    goals = np.zeros((num_nodes, owners.shape[1]), dtype=np.bool_)
    for nodes in owners:
        shards = np.flatnonzero(nodes != NOBODY)
        goals[nodes[shards], shards] = True
    return PlacementTarget(owners, goals, is_named, is_settled)


def next_assignment(
    target: PlacementTarget, ready: BoolArray, told: Sequence[BoolArray], room_shards: Int64Array | None
) -> ShardAssignment:
    """Returns the next step towards `target`. Call it again with each report; it ends with the target itself.

    `ready` [N, P] is what nodes have loaded and tested, `told` [P] by node what they were told last, `room_shards` [N]
    how many each has room for (None: for all). A node unloads a shard when all nodes that shall own it are ready, or,
    where it lacks the room for what it shall load, when another ready one keeps it. Where not even that makes room, the
    load waits: a placement that is less even serves better than a shard that is gone.
    """
    held = ready.copy()
    superfluous = ready > target.goals  # in the one and not in the other: one pass over the tables instead of two
    if superfluous.any():
        has_arrived = ~(target.goals > ready).any(axis=0) & target.goals.any(axis=0) & target.is_settled
        held[superfluous & (has_arrived | ~target.is_named)] = False
    to_load = target.goals > held
    missing = _count_rows(to_load)
    room = missing if room_shards is None else room_shards - _count_rows(held)
    is_roomy = missing <= np.maximum(room, 0)
    if is_roomy.all():
        held |= to_load
    else:
        held[is_roomy] |= to_load[is_roomy]
        _exchange(held, to_load, target.goals, told, room, ~is_roomy, ready)
    owners = _ask_order(ready & held, target)
    owners[:, ~target.is_named] = 0
    is_served = owners[0] > 0 if len(owners) else np.zeros_like(target.is_named)
    return ShardAssignment(held, owners, target.is_named & ~is_served)


def _count_rows(table: BoolArray) -> Int64Array:
    return np.array([np.count_nonzero(row) for row in table], dtype=np.int64)  # ten times as fast as a sum by axis


def _exchange(
    held: BoolArray,
    to_load: BoolArray,
    goals: BoolArray,
    told: Sequence[BoolArray],
    room: Int64Array,
    is_tight: BoolArray,
    ready: BoolArray,
) -> None:
    """Nodes that lack room unload what others keep, one node after the other, and load what then fits."""
    keepers = (held & ready).sum(axis=0, dtype=np.int32)
    for node in np.flatnonzero(is_tight).tolist():
        wanted, going = np.flatnonzero(to_load[node]), np.flatnonzero(held[node] & ~goals[node])
        going = going[keepers[going] > 1]
        going = going[np.argsort(-keepers[going], kind="stable")][: max(0, wanted.size - int(room[node]))]
        held[node, going] = False
        keepers[going] -= 1
        # Shards with the fewest ready copies first; then what the node was told before, so that no load is broken off.
        order = np.lexsort((wanted, ~told[node][wanted], keepers[wanted]))
        held[node, wanted[order][: max(0, int(room[node]) + going.size)]] = True


def _ask_order(usable: BoolArray, target: PlacementTarget) -> Int32Array:
    """Returns owners first, in their order; then those who hold a shard that they are not to keep, by their ids."""
    further = usable > target.goals
    others = np.flatnonzero(further.any(axis=1)).tolist()
    order = np.zeros((len(target.owners) + len(others), usable.shape[1]), dtype=np.int32)
    filled = np.zeros(usable.shape[1], dtype=np.int64)

    def append(nodes: Int64Array | int, shards: Int64Array) -> None:
        order[filled[shards], shards] = nodes + 1
        filled[shards] += 1

    for nodes in target.owners:
        shards = np.flatnonzero(nodes != NOBODY)
        shards = shards[usable[nodes[shards], shards]]
        append(nodes[shards], shards)
    for node in others:
        append(node, np.flatnonzero(further[node]))
    return order[: int(filled.max(initial=0))]
