"""Who can take which role where nodes see parts of the checkpoint, and what is said of a role that nobody can. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from common.topology import LayerRange, NodeDescription

MAX_NAMED = 8


def loadable_slots(
    node: NodeDescription, layers: Sequence[LayerRange], no_room: Set[int] = frozenset()
) -> frozenset[int] | None:
    """Indexes of the slots whose weights a stage node sees, by each slot's layers, but those that it has no room for.

    None: all slots.
    """
    if node.part is None and not no_room:
        return None
    return frozenset(slot for slot, span in enumerate(layers) if slot not in no_room and node.can_load_layers(span))


def describe_unfilled(slots: Iterable[int], layers: Sequence[LayerRange], nodes: Iterable[NodeDescription]) -> str:
    """Why slots stay empty although nodes are free, as the end of a sentence; "" for none."""
    living = list(nodes)
    found = ""
    for slot in slots:
        is_seen = any(node.can_load_layers(layers[slot]) for node in living)
        who = "nobody else has" if is_seen else "nobody has"
        found += f"; {who} the weights of layers [{layers[slot].start}, {layers[slot].stop})"
    return found


def unseen_experts(seen: Iterable[frozenset[int] | None], num_experts: int) -> tuple[int, ...]:
    """Experts whose weights no node sees; none where there are no nodes at all. `seen` by node; None: all."""
    parts = list(seen)
    if not parts or None in parts:
        return ()
    return tuple(sorted(set(range(num_experts)).difference(*(part for part in parts if part is not None))))


def describe_unseen(experts: Sequence[int]) -> str:
    """As a sentence."""
    named = ", ".join(map(str, experts[:MAX_NAMED]))
    more = f" and {len(experts) - MAX_NAMED} more" if len(experts) > MAX_NAMED else ""
    return f"no expert node has the weights of {'expert' if len(experts) == 1 else 'experts'} {named}{more}"
