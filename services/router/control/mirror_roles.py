"""Mirrors as spares and holders come and go: which spare follows which slot, and how far each copy is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from common.ids import LeaseTerm, NodeId
from common.messages import Header, MirrorTo
from common.topology import NodeDescription, StageSlot, StageState
from services.router.control.actions import Action, RoleMessages, Tell
from services.router.control.matching import fill
from services.router.control.sizes import StageSizes

RETRY_S = 5.0
"""The wait after a spare could not load its slot; twice as long each time, until a mirror is complete again."""
MAX_RETRY_S = 80.0
FILL_PATIENCE_S = 60.0
"""How long a mirror may take to become complete, where another spare could follow the slot: its holder may not reach
this one. A copy may take longer than that; so each further mirror of the slot gets twice the time of the one before."""
Nodes = Mapping[NodeId, NodeDescription]
"""Living stage nodes in the order in which they joined."""


@dataclass(slots=True)
class MirrorPair:
    """A slot's mirror."""

    node_id: NodeId
    primary: NodeId
    lease_term: LeaseTerm
    num_blocks: int
    shares_host: bool
    """Whether one host that is lost takes the slot's holder and its mirror."""
    number: int = 0
    """The number of the role that the mirror was told."""
    state: StageState = StageState.LOADING
    feed_number: int = 0
    """The number of the message that tells the holder to send to it; 0: it has not loaded yet."""
    broken_stream: int = 0
    """The last stream of rows of which the mirror said that it broke."""
    filling_since_s: float | None = None
    """None: `is_due` has not been asked since it began."""


@dataclass(frozen=True, slots=True)
class MirroredSlot:
    """A slot as it is held now."""

    slot: StageSlot
    holder: NodeDescription
    lease_term: LeaseTerm
    num_blocks: int
    is_wanted: bool
    """Whether a mirror is to be found for it if it has none."""
    is_leaving: bool = False
    """Whether its holder waits for the mirror in order to go."""


def valid_pairs(
    pairs: Mapping[StageSlot, MirrorPair], slots: Sequence[MirroredSlot], spares: Sequence[NodeId]
) -> dict[StageSlot, MirrorPair]:
    """Returns pairs whose mirror is still a spare and whose slot is held as it was when they were made."""
    now = {wanted.slot: wanted for wanted in slots}
    return {
        slot: pair
        for slot, pair in pairs.items()
        if pair.node_id in spares
        and slot in now
        and (pair.primary, pair.lease_term, pair.num_blocks)
        == (now[slot].holder.node_id, now[slot].lease_term, now[slot].num_blocks)
    }


def choose_mirrors(
    slots: Sequence[MirroredSlot],
    pairs: Mapping[StageSlot, MirrorPair],
    successors: Mapping[StageSlot, MirrorPair],
    spares: Sequence[NodeDescription],
    fits: Callable[[NodeDescription, MirroredSlot], bool],
) -> dict[StageSlot, NodeDescription]:
    """Finds new mirrors, by slot, among spares that mirror no slot yet. They are taken in the order of `spares`.

    A mirror is of its slot's numeric class: another one would change bits after a takeover. Slots whose holder leaves
    come first. Then as many as can be get a mirror on another host than their holder's, and what spares are left go to
    slots that have none. A slot whose mirror shares its holder's host gets another one where a spare elsewhere is idle;
    `successors` are those that were found before and are not ready yet.
    """
    taken = {pair.node_id for pair in (*pairs.values(), *successors.values())}
    idle = [spare for spare in spares if spare.node_id not in taken]
    wanted = [slot for slot in slots if slot.is_wanted]
    alone = [slot for slot in wanted if slot.slot not in pairs]
    leaving = [slot for slot in alone if slot.is_leaving]
    on_one_host = [s for s in wanted if s.slot in pairs and pairs[s.slot].shares_host and s.slot not in successors]
    chosen: dict[StageSlot, NodeDescription] = {}
    # A successor before a mirror on one host: the spare that it sets free may be elsewhere for the slot that has none.
    for of, on_other_host in ((leaving, True), (leaving, False), (alone, True), (on_one_host, True), (alone, False)):
        found = _match([slot for slot in of if slot.slot not in chosen], idle, fits, on_other_host=on_other_host)
        chosen |= found
        idle = [spare for spare in idle if spare not in found.values()]
    return chosen


def _match(
    slots: Sequence[MirroredSlot],
    idle: Sequence[NodeDescription],
    fits: Callable[[NodeDescription, MirroredSlot], bool],
    *,
    on_other_host: bool,
) -> dict[StageSlot, NodeDescription]:
    """Returns as many pairs as can be, the first slots and the first spares before others."""
    able = [
        [
            spare.numeric_class == slot.holder.numeric_class
            and not (on_other_host and spare.host_label == slot.holder.host_label)
            and fits(spare, slot)
            for spare in idle
        ]
        for slot in slots
    ]
    held = [[0] * len(idle) for _ in slots]
    limits = [[int(is_able) for is_able in row] for row in able]
    fill(held, [1] * len(slots), [1] * len(idle), limits, lambda _, number: number)
    return {
        slot.slot: idle[number]
        for slot, row in zip(slots, held, strict=True)
        for number, count in enumerate(row)
        if count
    }


class MirrorRoles:
    """At most one mirror per slot."""

    def __init__(self, messages: RoleMessages, sizes: StageSizes, num_spares: int, nodes: Nodes) -> None:
        """`num_spares`: how many are wished for. `nodes`: as they are at any time."""
        self._messages = messages
        self._sizes = sizes
        self._num_spares = num_spares
        self._nodes = nodes
        self._pairs: dict[StageSlot, MirrorPair] = {}
        self._successors: dict[StageSlot, MirrorPair] = {}
        """Spares that load a slot's layers on another host in place of a mirror that shares its holder's. Until it has
        loaded them, the pair that there is stays."""
        self._wanted: dict[StageSlot, MirroredSlot] = {}
        """Slots that are to have a mirror."""
        self._spares: Sequence[NodeDescription] = ()
        self._failed: set[tuple[NodeId, StageSlot]] = set()
        """Spares that could not load a slot, or were not filled. One may have had no socket, or its disk or a link may
        have failed: it is asked again."""
        self._unfilled: set[tuple[NodeId, StageSlot]] = set()
        """Those of them that had loaded and were not filled in time. As they may load again and displace a mirror that
        is filled, they are asked again only where the slot has no other: a holder feeds one mirror at a time."""
        self._retry_at_s: float | None = None
        """None: `is_due` has not been asked since the last of them failed."""
        self._retry_s = RETRY_S
        self._fill_patience_s: dict[StageSlot, float] = {}
        """The patience for slots one of whose mirrors was given up since one was complete."""

    @property
    def nodes(self) -> dict[StageSlot, NodeId]:
        """Returns each slot's mirror, however far it is."""
        return {slot: pair.node_id for slot, pair in self._pairs.items()}

    @property
    def num_complete(self) -> int:
        """Counts mirrors that could take over at once."""
        return sum(pair.state is StageState.COMPLETE for pair in self._pairs.values())

    @property
    def num_missing(self) -> int:
        """Counts slots that could have a mirror that takes over at once, with the spares that SPARES asks for or that
        there are, and have none."""
        expected = min(len(self._wanted), max(self._num_spares, len(self._spares)))
        return max(0, expected - sum(self.is_complete(slot) for slot in self._wanted))

    def node_of(self, slot: StageSlot) -> NodeId | None:
        """Returns the slot's mirror, if its copy is complete."""
        pair = self._pairs.get(slot)
        return pair.node_id if pair is not None and pair.state is StageState.COMPLETE else None

    def is_complete(self, slot: StageSlot) -> bool:
        """Returns whether its mirror could take over at once."""
        return self.node_of(slot) is not None

    def replaceable(self, silent: Set[NodeId]) -> list[NodeId]:
        """Returns those of these that hold a slot that its mirror, which is not silent, could take over at once."""
        return sorted(
            pair.primary
            for pair in self._pairs.values()
            if pair.state is StageState.COMPLETE and pair.primary in silent and pair.node_id not in silent
        )

    def replan(self, slots: Sequence[MirroredSlot], spares: Sequence[NodeDescription]) -> list[Action]:
        """Drop pairs that no longer hold, and find mirrors for slots without one. `spares` by join order."""
        self._wanted, self._spares = {held.slot: held for held in slots if held.is_wanted}, spares
        before, spare_ids = self._pairs, [spare.node_id for spare in spares]
        valid = valid_pairs(before, slots, spare_ids)
        self._forget({failure for failure in self._failed if failure[0] not in self._nodes})
        self._forget({failure for failure in self._unfilled if failure[1] not in valid})
        self._pairs = self._not_failed(valid)
        self._successors = {
            slot: pair
            for slot, pair in self._not_failed(valid_pairs(self._successors, slots, spare_ids)).items()
            if slot in self._pairs and self._pairs[slot].shares_host
        }
        actions: list[Action] = [
            self._stop(pair.primary, pair.lease_term)
            for slot, pair in before.items()
            if slot not in self._pairs and pair.primary in self._nodes and pair.state is not StageState.LOADING
        ]
        # Those that see least first: one that sees all can follow any slot that is left. Equals stay in join order.
        in_line = sorted(spares, key=lambda spare: sum(spare.can_load_layers(span) for span in self._messages.layers))
        chosen = choose_mirrors(slots, self._pairs, self._successors, in_line, self._fits)
        for wanted in slots:
            if wanted.slot in chosen:
                mirror, terms = chosen[wanted.slot], (wanted.lease_term, wanted.num_blocks)
                shares_host = mirror.host_label == wanted.holder.host_label
                pair = MirrorPair(
                    mirror.node_id, wanted.holder.node_id, *terms, shares_host, self._messages.draw_number()
                )
                (self._successors if wanted.slot in self._pairs else self._pairs)[wanted.slot] = pair
                actions.append(self._assign(wanted.slot, pair))
        return actions

    def _not_failed(self, pairs: Mapping[StageSlot, MirrorPair]) -> dict[StageSlot, MirrorPair]:
        return {slot: pair for slot, pair in pairs.items() if (pair.node_id, slot) not in self._failed}

    def apply_report(
        self, node_id: NodeId, number: int, *, is_complete: bool, broken_stream: int = 0
    ) -> list[Action] | None:
        """A mirror is loaded (its primary is told to begin), complete, or its stream broke (its primary begins anew).
        `number`: of the role that it follows; the others: as in MirrorReady.

        None: it is not what its number stands for any more, or says nothing new.
        """
        found = next(((slot, pair) for slot, pair in self._pairs_of(node_id) if pair.number == number), None)
        if found is None:
            return None
        slot, pair = found
        has_broken = broken_stream > pair.broken_stream
        state = StageState.COMPLETE if is_complete else StageState.FILLING
        if not has_broken and pair.state is state:
            return None
        must_begin = has_broken or pair.state is StageState.LOADING
        if is_complete:
            self._retry_s, pair.filling_since_s = RETRY_S, None
            self._fill_patience_s.pop(slot, None)
        pair.state, pair.broken_stream = state, max(pair.broken_stream, broken_stream)
        if not must_begin:
            return []
        pair.feed_number = self._messages.draw_number()
        if self._successors.get(slot) is pair:
            self._pairs[slot] = self._successors.pop(slot)
        return [self._feed(pair)]

    def _pairs_of(self, node_id: NodeId) -> list[tuple[StageSlot, MirrorPair]]:
        """Returns the slot that a node mirrors, or is to mirror as a successor; nothing for others."""
        every = [*self._pairs.items(), *self._successors.items()]
        return [(slot, pair) for slot, pair in every if pair.node_id == node_id]

    def number_of(self, node_id: NodeId) -> int | None:
        """Returns the number of the role of a node that mirrors a slot; None for others."""
        return next((pair.number for _, pair in self._pairs_of(node_id)), None)

    def assign_again(self, node_id: NodeId) -> list[Action]:
        """Tell a mirror its role."""
        return [self._assign(slot, pair) for slot, pair in self._pairs_of(node_id)]

    def feed_number_of(self, slot: StageSlot) -> int:
        """Returns the number of what the slot's holder was told to feed; 0: none."""
        pair = self._pairs.get(slot)
        return 0 if pair is None else pair.feed_number

    def feed_again(self, slot: StageSlot, holder: NodeId, lease_term: int) -> list[Action]:
        """Tell the slot's holder, which has it by this lease, which mirror to feed, or that there is none."""
        pair = self._pairs.get(slot)
        if pair is not None and pair.feed_number:
            return [self._feed(pair)]
        return [self._stop(holder, lease_term)]

    def _assign(self, slot: StageSlot, pair: MirrorPair) -> Action:
        message = self._messages.mirror(slot, pair.lease_term, pair.num_blocks, self._nodes[pair.primary])
        return Tell(pair.node_id, message, Header(generation=pair.number))

    def _feed(self, pair: MirrorPair) -> Action:
        own = self._nodes[pair.node_id]
        message = MirrorTo(pair.lease_term, pair.node_id, own.endpoints, own.ipc_token)
        return Tell(pair.primary, message, Header(generation=pair.feed_number))

    def _stop(self, holder: NodeId, lease_term: int) -> Action:
        return Tell(holder, MirrorTo(lease_term, "", (), ""), Header(generation=self._messages.draw_number()))

    def release(self, node_id: NodeId) -> None:
        """A node is told to forget everything: it has to be told again what it mirrors."""
        for slot, pair in self._pairs_of(node_id):
            del (self._pairs if self._pairs.get(slot) is pair else self._successors)[slot]

    def fail(self, node_id: NodeId, number: int) -> bool:
        """A spare could not load what it was to mirror, by the role of this number. False: that is no news."""
        for slot, pair in self._pairs_of(node_id):
            if pair.number == number and pair.state is StageState.LOADING:
                self._give_up(slot, pair)
                return True
        return False

    def _forget(self, failures: Set[tuple[NodeId, StageSlot]]) -> None:
        self._failed -= failures
        self._unfilled -= failures

    def _give_up(self, slot: StageSlot, pair: MirrorPair) -> None:
        """The next plan drops the pair."""
        self._failed.add((pair.node_id, slot))
        self._retry_at_s = None

    @property
    def waits(self) -> bool:
        """Returns whether `is_due` may have something to say."""
        return bool(self._failed) or any(pair.state is StageState.FILLING for pair in self._pairs.values())

    def is_due(self, now_s: float) -> bool:
        """Returns whether to find mirrors anew: a spare that could not be one is asked again, or one that is not
        complete in time gives way to another. Ask again and again while `waits`; the first time begins the wait."""
        return self._forgives(now_s) or self._gives_up(now_s)

    def _forgives(self, now_s: float) -> bool:
        kept = {failure for failure in self._unfilled if failure[1] in self._pairs}
        if self._failed == kept:
            return False
        if self._retry_at_s is None:
            self._retry_at_s = now_s + self._retry_s
        if now_s < self._retry_at_s:
            return False
        self._forget(self._failed - kept)
        self._retry_at_s, self._retry_s = None, min(2 * self._retry_s, MAX_RETRY_S)
        return True

    def _gives_up(self, now_s: float) -> bool:
        for slot, pair in self._pairs.items():
            if pair.state is not StageState.FILLING:
                continue
            if pair.filling_since_s is None:
                pair.filling_since_s = now_s
            patience_s = self._fill_patience_s.get(slot, FILL_PATIENCE_S)
            if now_s - pair.filling_since_s >= patience_s and self._has_other_spare(slot):
                self._fill_patience_s[slot] = 2 * patience_s
                self._give_up(slot, pair)
                self._unfilled.add((pair.node_id, slot))
                return True
        return False

    def _has_other_spare(self, slot: StageSlot) -> bool:
        """Returns whether a spare may take the place of the slot's mirror. A spare that was not filled counts again
        once all others have been tried."""
        idle = self._idle_spares(slot)
        if idle and not idle - self._failed:
            self._forget(idle & self._unfilled)
        return bool(idle - self._failed)

    def _idle_spares(self, slot: StageSlot) -> set[tuple[NodeId, StageSlot]]:
        """Returns the spares that mirror nothing and have room for the slot, each with the slot."""
        wanted = self._wanted.get(slot)
        if wanted is None:
            return set()
        return {
            (spare.node_id, slot)
            for spare in self._spares
            if spare.numeric_class == wanted.holder.numeric_class
            and not self._pairs_of(spare.node_id)
            and self._has_room(spare, wanted)
        }

    def _fits(self, spare: NodeDescription, wanted: MirroredSlot) -> bool:
        return self._has_room(spare, wanted) and (spare.node_id, wanted.slot) not in self._failed

    def _has_room(self, spare: NodeDescription, wanted: MirroredSlot) -> bool:
        index = wanted.slot.index
        needed = self._sizes.weight_bytes(index) + (wanted.num_blocks + 1) * self._sizes.block_bytes(index)
        return spare.capacity_bytes >= needed and spare.can_load_layers(self._messages.layers[index])
