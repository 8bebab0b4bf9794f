"""Mirrors as spares and holders come and go: who is told to follow whom, and how far each copy is. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.ids import NodeId
from common.messages import Header, MirrorReady, MirrorTo
from common.model_config import ModelConfig
from common.topology import LayerRange, NodeDescription, StageSlot
from services.router.control.actions import Action, Tell
from services.router.control.mirrors import MirroredSlot, MirrorPair, MirrorState, Spare, choose_mirrors, valid_pairs
from services.router.control.role_messages import assign_mirror
from services.router.control.sizes import MeshShape, block_bytes_of, stage_weight_bytes

Nodes = Mapping[NodeId, tuple[NodeDescription, int]]
"""Living stage nodes with their join order."""


class MirrorRoles:
    """One mirror a slot at most."""

    def __init__(self, config: ModelConfig, shape: MeshShape, layers: Sequence[LayerRange]) -> None:
        self._config = config
        self._shape = shape
        self._layers = layers
        self._pairs: dict[StageSlot, MirrorPair] = {}
        self._successors: dict[StageSlot, MirrorPair] = {}
        """Who loads a slot's layers on another host in place of a mirror that shares its holder's. Until it has loaded
        them, the pair that there is stays."""
        self._failed: set[tuple[NodeId, StageSlot]] = set()
        """Not tried again: the router says so in its log, and another incarnation is another node."""

    @property
    def nodes(self) -> dict[StageSlot, NodeId]:
        """Each slot's mirror, however far it is."""
        return {slot: pair.node_id for slot, pair in self._pairs.items()}

    @property
    def num_complete(self) -> int:
        """Mirrors that could take over at once."""
        return sum(pair.state is MirrorState.COMPLETE for pair in self._pairs.values())

    def node_of(self, slot: StageSlot) -> NodeId | None:
        """The slot's mirror, if its copy is complete."""
        pair = self._pairs.get(slot)
        return pair.node_id if pair is not None and pair.state is MirrorState.COMPLETE else None

    def has_pair(self, slot: StageSlot) -> bool:
        """Whether anybody follows the slot."""
        return slot in self._pairs

    def is_complete(self, slot: StageSlot) -> bool:
        """Whether its mirror could take over at once."""
        return self.node_of(slot) is not None

    def replan(self, slots: Sequence[MirroredSlot], spares: Sequence[NodeDescription], nodes: Nodes) -> list[Action]:
        """Drop pairs that are no more, and find mirrors for slots without one. `spares` by join order."""
        before, spare_ids = self._pairs, [spare.node_id for spare in spares]
        self._pairs = valid_pairs(before, slots, spare_ids)
        self._successors = {
            slot: pair
            for slot, pair in valid_pairs(self._successors, slots, spare_ids).items()
            if slot in self._pairs and self._pairs[slot].shares_host
        }
        actions: list[Action] = [
            Tell(pair.primary, MirrorTo(pair.lease_term, "", (), ""), Header())
            for slot, pair in before.items()
            if slot not in self._pairs and pair.primary in nodes and pair.state is not MirrorState.LOADING
        ]
        # Who sees least first: who sees everything can follow any slot that is left. Equals stay in join order.
        in_line = sorted(spares, key=lambda spare: sum(spare.can_load_layers(span) for span in self._layers))
        by_id = {spare.node_id: spare for spare in spares}
        chosen = choose_mirrors(
            slots,
            self._pairs,
            self._successors,
            [Spare(spare.node_id, spare.numeric_class, spare.host_label) for spare in in_line],
            lambda node_id, slot: self._fits(by_id[node_id], slot),
        )
        for wanted in slots:
            if wanted.slot in chosen:
                node_id, terms = chosen[wanted.slot], (wanted.lease_term, wanted.num_blocks)
                shares_host = by_id[node_id].host_label == wanted.host_label
                pair = MirrorPair(node_id, wanted.holder, *terms, shares_host)
                (self._successors if wanted.slot in self._pairs else self._pairs)[wanted.slot] = pair
                holder = nodes[wanted.holder][0]
                message = assign_mirror(wanted.slot, self._layers, wanted.lease_term, wanted.num_blocks, holder)
                actions.append(Tell(pair.node_id, message, Header()))
        return actions

    def take_report(self, node_id: NodeId, message: MirrorReady, nodes: Nodes) -> list[Action]:
        """A mirror is loaded (its primary is told to begin), complete, or spoilt (its primary begins anew)."""
        for slot, pair in [*self._pairs.items(), *self._successors.items()]:
            told = (slot.pipeline, slot.index, pair.lease_term, pair.node_id)
            if told != (message.pipeline, message.slot, message.lease_term, node_id):
                continue
            if message.is_complete:
                pair.state = MirrorState.COMPLETE
                return []
            pair.state = MirrorState.FILLING
            if self._successors.get(slot) is pair:
                self._pairs[slot] = self._successors.pop(slot)
            own = nodes[node_id][0]
            return [Tell(pair.primary, MirrorTo(pair.lease_term, node_id, own.endpoints, own.ipc_token), Header())]
        return []

    def release(self, node_id: NodeId) -> None:
        """A node is told to forget everything: whom it mirrors has to be told to it again."""
        for pairs in (self._pairs, self._successors):
            for slot, pair in list(pairs.items()):
                if pair.node_id == node_id:
                    del pairs[slot]

    def fail(self, node_id: NodeId) -> None:
        """A spare could not load what it was to mirror."""
        for pairs in (self._pairs, self._successors):
            for slot, pair in list(pairs.items()):
                if pair.node_id == node_id and pair.state is MirrorState.LOADING:
                    self._failed.add((node_id, slot))
                    del pairs[slot]

    def _fits(self, spare: NodeDescription, wanted: MirroredSlot) -> bool:
        index = wanted.slot.index
        layers = self._layers[index]
        needed = stage_weight_bytes(self._config, self._shape, index, layers)
        needed += (wanted.num_blocks + 1) * block_bytes_of(self._config, self._shape, index, layers)
        is_able = spare.capacity_bytes >= needed and spare.can_load_layers(layers)
        return is_able and (spare.node_id, wanted.slot) not in self._failed
