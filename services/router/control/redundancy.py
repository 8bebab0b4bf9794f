"""What there is twice and what is not: what the next loss would cost. Said while nothing is lost. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Redundancy:
    """Counts, as they are now."""

    complete_mirrors: int = 0
    """Slots whose mirror could take over at once."""
    missing_mirrors: int = 0
    """Slots that should have one and have not."""
    missing_copies: int = 0
    """Safety copies of expert shards that are wished for and have no room or no node."""
    copies_to_load: int = 0
    """Those that have a place and are not loaded yet."""

    def warnings(self) -> tuple[str, ...]:
        """Each thing that there should be twice and is not, as a sentence."""
        said = (
            (self.missing_mirrors, "slots of pipelines have no mirror that could take over"),
            (self.missing_copies, "safety copies of expert shards have no room or no node"),
            (self.copies_to_load, "safety copies of expert shards are not loaded yet"),
        )
        return tuple(f"{count} {what}" for count, what in said if count)


NOTHING_MISSING = Redundancy()
