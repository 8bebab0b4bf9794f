"""What the router believes of one pipeline: who holds its slots, and whether there is cache to be kept. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.ids import Generation, NodeId
from services.router.control.adoption import HeldCache


@dataclass(slots=True)
class Pipeline:
    """One pipeline's holders in one generation."""

    generation: Generation
    holders: tuple[NodeId | None, ...]
    """None: a hole."""
    num_blocks: int
    marks: dict[int, int] = field(default_factory=dict)
    """By slot that is ready in this generation: up to which step its paged memory is good."""
    is_open: bool = False
    has_pool: bool = False
    """The scheduler keeps its requests' blocks, also while it is not open."""
    held: HeldCache | None = None
    """From a router before this one, until it opens."""

    @property
    def is_whole(self) -> bool:
        """Every slot has a holder."""
        return None not in self.holders

    @property
    def has_cache(self) -> bool:
        """Requests have cache here, or had some under a router before this one."""
        return self.has_pool or self.held is not None

    def has_all_of(self, sequence_id: int) -> bool:
        """Whether it goes on with a sequence as soon as it opens: those who reported it hold all slots still."""
        held = self.held
        if held is None or not self.is_whole:
            return False
        return sequence_id in held.sequences and len(held.last_steps) == len(self.holders)
