"""Up to which step everything is done. Pure.

Steps arrive and end in any order: one whose expert answers are in overtakes one that waits, here or on a stage before
this one, and a replay that is only relayed overtakes both. That every step that has come is finished therefore says
nothing of one that has not. So each step names the one that the router sent before it, and the *mark* follows this
chain as far as it is unbroken: it is the newest step that is finished with all those before it.
"""

from __future__ import annotations

from common.errors import ProtocolError


class StepWatermark:
    """Steps of one slot, over all generations: their numbers are unique and ascend. A chain lasts for a generation."""

    def __init__(self, mark: int = 0) -> None:
        self.mark = mark
        self.newest = mark
        """The newest step that has come, finished or not."""
        self._chain_end = 0
        """Up to here the chain of this generation is unbroken and finished; 0: its first step is not."""
        self._followers: dict[int, int] = {}
        """Steps that have come and are not part of that, by the step before them."""
        self._finished: set[int] = set()

    def begin(self, step: int, previous: int) -> None:
        """Notes that a step has come; `previous` is the one that the router sent before it in this generation, 0 for
        the first.

        Raises ProtocolError where that cannot be: nothing may be concluded from such a chain.
        """
        if previous >= step or previous < self._chain_end or previous in self._followers:
            raise ProtocolError(
                f"Step.previous_step of step {step} is {previous}: it must be the step sent before it in this "
                "generation, which no other step may follow"
            )
        self.newest = max(self.newest, step)
        self._followers[previous] = step

    def finish(self, step: int) -> None:
        """Notes that what a step had to write is written. An unknown one is not an error: a new generation dropped
        it."""
        if step in self._followers.values():
            self._finished.add(step)
        while (follower := self._followers.get(self._chain_end)) in self._finished:
            del self._followers[self._chain_end]
            self._finished.remove(follower)
            self._chain_end = self.mark = follower

    def begin_generation(self) -> None:
        """Begins another generation: what is under way, here or elsewhere, will never be answered, so nothing counts on
        it; what was answered has come and was finished. So everything that ever counts is done up to the newest."""
        self._followers.clear()
        self._finished.clear()
        self._chain_end = 0
        self.mark = self.newest
