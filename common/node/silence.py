"""Which peers are silent for longer than their links explain, from pings that they echo. Pure; time is an argument.

All peers are pinged at the same moments. A peer is *behind* from the moment on at which another one has echoed a ping
that is newer than all that it has echoed itself: so the others are witnesses that the ping was sent, that it could be
answered, and that the observer was there to hear it. Where no peer echoes anything, none is behind: the observer is cut
off, or its host stood still, and it can say nothing of any.

How long a peer may be behind is held against what the same link has shown: one that was never behind for more than
60 ms says something with 250, one that now and then was for 250 ms says nothing with 400. There are two questions. An
*early* one, where a wrong yes costs little because a substitute is ready: then a silence counts soon. A *patient* one
for all others: the silence must be long, and longer for a link that loses packets.

That a link's own past is the measure is the idea of accrual failure detectors (Hayashibara et al., "The phi accrual
failure detector", 2004). Their normal distribution is not used: silences have tails of scheduling and resends that it
does not have, so a factor over the longest one stands in its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from common.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a silence must be to say something. Checked when made: ConfigurationError."""

    shortest_s: float
    """A shorter one never does."""
    longest_s: float
    """A longer one always does, if `beyond_longest`."""
    factor: float
    """Multiplies the longest silence that the link has shown."""
    min_echoes: int
    """A link that has shown less is given the longest time, or is not judged."""
    beyond_longest: bool
    """Whether a link that would need longer than the longest is judged by that; else it is not judged."""

    def __post_init__(self) -> None:
        if not 0 < self.shortest_s <= self.longest_s:
            raise ConfigurationError("shortest_s must be above 0 and not above longest_s")
        if self.factor < 1 or self.min_echoes < 1:
            raise ConfigurationError("factor and min_echoes must be at least 1")

    def explained_s(self, num_echoes: int, shown_s: float, is_late: bool = False) -> float | None:
        """Returns how long a link may be silent that has shown this; None: it is not judged. `is_late`: the observer
        is."""
        if is_late:
            return LATE_FACTOR * self.longest_s if self.beyond_longest else None
        wanted_s = max(self.shortest_s, self.factor * shown_s)
        if num_echoes < self.min_echoes or wanted_s > self.longest_s:
            return self.longest_s if self.beyond_longest else None
        return wanted_s


LATE_FACTOR = 2.0
"""A packet that is lost four times comes after 3.0 s, with its ping and its echo on one link, and one that is lost five
times after 6.2."""
EARLY = Patience(shortest_s=0.25, longest_s=0.6, factor=2.0, min_echoes=40, beyond_longest=False)
"""A process under a CPU quota may wait 100 ms for its next period, one on cores that are twice oversubscribed some time
slices of 3 to 25 ms for each of the two threads that echo."""
PATIENT = Patience(shortest_s=0.7, longest_s=3.0, factor=3.0, min_echoes=20, beyond_longest=True)
"""TCP sends a lost packet again after 0.2, 0.6 and 1.4 s."""


# When pings go, and what is remembered of them.
PING_INTERVAL_S = 0.05
MEMORY_S = 300.0
LONGEST_TURN_S = 0.1
"""The longest turn of the observer's loop: after a longer absence it has not heard what came meanwhile. Time beyond
that is not counted."""
ALONE_S = 0.5
"""Without any echo the observer is alone, and after that it waits before it judges: connections come back one after
the other, as late as they have been away, within these bounds."""
SHORTEST_RETURN_S = 1.5
LONGEST_RETURN_S = 3.0
LATE_SILENCE_S = 0.15
"""One that ended after less is that of a busy process; TCP sends a lost packet again after 0.2 s at the soonest."""
LATE_MEMORY_S = 10.0
LATE_LINKS = 3
"""At least this many links, and half of them, must have shown a late silence for the observer to be late."""
AWAY_S = 2.0
"""An observer that stood still for longer may have had its connections closed for its own silence. So it waits just
as it does after it was alone."""


class RecentLongest:
    """The longest of what was added in the last `memory_s`, to within a thirtieth of it."""

    NUM_PARTS = 30

    def __init__(self, memory_s: float) -> None:
        self._part_s = memory_s / self.NUM_PARTS
        self._parts: deque[tuple[int, float]] = deque()
        """Number of the part of time, and the longest in it; the newest last."""

    def add(self, now_s: float, seconds: float) -> None:
        """`now_s` ascends."""
        part = int(now_s // self._part_s)
        if self._parts and self._parts[-1][0] == part:
            seconds = max(seconds, self._parts.pop()[1])
        self._parts.append((part, seconds))
        while self._parts[0][0] <= part - self.NUM_PARTS:
            self._parts.popleft()

    @property
    def value_s(self) -> float:
        """Returns 0 where nothing was added."""
        return max((seconds for _, seconds in self._parts), default=0.0)


@dataclass(slots=True)
class _Link:
    shown: RecentLongest
    newest: int
    """Number of the newest ping that it has echoed."""
    num_echoes: int = 0
    worked_s: float = 0.0
    """When it was sent the newest of what it has answered."""


class SilenceWatch:
    """See the module. Each turn of the observer's loop: `turn`, `echoed` for each echo, then `silent`."""

    def __init__(self) -> None:
        self.last_ping = 0
        self._links: dict[str, _Link] = {}
        self._awake_s = 0.0
        self._turned_s: float | None = None
        self._pinged_s = float("-inf")
        self._first_echo_s: deque[tuple[int, float]] = deque(maxlen=256)
        """Pings that were the newest echoed so far when their first echo came, with the moments of that."""
        self._heard_s = 0.0
        """When any echo last came."""
        self._judges_from_s = 0.0
        self._late_s: dict[str, float] = {}
        """When each link last ended a late silence; those that are gone since then are witnesses, too."""

    def turn(self, now_s: float) -> bool:
        """Notes that the observer's loop turns. Returns whether all are to be pinged now, with the number
        `last_ping`."""
        if self._turned_s is not None:
            turn_s = max(0.0, now_s - self._turned_s)
            self._awake_s += min(turn_s, LONGEST_TURN_S)
            if turn_s > AWAY_S:
                self._wait_for_return(turn_s)
        self._turned_s = now_s
        if self._awake_s - self._pinged_s < PING_INTERVAL_S:
            return False
        self._pinged_s = self._awake_s
        self.last_ping += 1
        return True

    def echoed(self, link: str, ping: int) -> float | None:
        """Notes that a ping came back. Returns the silence that this has ended, 0 where the link was not behind; None:
        an old one."""
        if not 0 < ping <= self.last_ping:
            return None
        known = self._links.get(link)
        self._note_heard()
        if known is None:  # what was before it came is not a silence of its own
            known = self._links[link] = _Link(RecentLongest(MEMORY_S), newest=ping - 1)
        if ping <= known.newest:
            return None
        silence_s = self._behind_s(known)
        if not self._first_echo_s or ping > self._first_echo_s[-1][0]:
            self._first_echo_s.append((ping, self._awake_s))
        known.newest = ping
        known.num_echoes += 1
        if silence_s >= LATE_SILENCE_S:
            since_s = self._awake_s - LATE_MEMORY_S
            self._late_s = {late: at_s for late, at_s in self._late_s.items() if at_s >= since_s}
            self._late_s[link] = self._awake_s
        if self._awake_s >= self._judges_from_s:  # how links come back says nothing of how they are
            known.shown.add(self._awake_s, silence_s)
        return silence_s

    def answered(self, link: str, ago_s: float) -> None:
        """It has answered what was sent to it this long ago; an unknown link is not an error."""
        known = self._links.get(link)
        if known is not None:
            known.worked_s = max(known.worked_s, self._awake_s - ago_s)

    def _note_heard(self) -> None:
        alone_s = self._awake_s - self._heard_s
        if self._links and alone_s > ALONE_S:
            self._wait_for_return(alone_s)
        self._heard_s = self._awake_s

    def _wait_for_return(self, absence_s: float) -> None:
        return_s = min(LONGEST_RETURN_S, max(SHORTEST_RETURN_S, absence_s))
        self._judges_from_s = self._awake_s + return_s

    def forget(self, link: str) -> None:
        """It is gone, or another process now; an unknown link is not an error."""
        self._links.pop(link, None)

    @property
    def is_alone(self) -> bool:
        """No peer has echoed anything for a while, or one has only just begun to again: the observer may be cut off. Or
        it has only just gone on after it stood still. Not before any peer has echoed at all."""
        is_silence = self._awake_s - self._heard_s > ALONE_S
        return bool(self._links) and (is_silence or self._awake_s < self._judges_from_s)

    @property
    def is_late(self) -> bool:
        """Many links have recently been answering late: the observer's own link, or its host, is to blame."""
        since_s = self._awake_s - LATE_MEMORY_S
        num_late = sum(late_s >= since_s for late_s in self._late_s.values())
        return num_late >= max(LATE_LINKS, len(self._links) / 2)

    def silence_s(self, link: str) -> float:
        """Returns for how long it has been behind and has answered nothing; 0 for one that is not known."""
        known = self._links.get(link)
        return 0.0 if known is None else min(self._behind_s(known), self._awake_s - known.worked_s)

    def explained_s(self, link: str, patience: Patience) -> float | None:
        """Returns how long it may be; None: it is not judged."""
        known = self._links.get(link)
        return None if known is None else patience.explained_s(known.num_echoes, known.shown.value_s, self.is_late)

    def silent(self, links: Collection[str], patience: Patience) -> list[str]:
        """Returns those of these that are silent for longer than is explained; none while the observer may be cut
        off."""
        if self.is_alone:
            return []
        return [
            link
            for link in links
            if (explained_s := self.explained_s(link, patience)) is not None and self.silence_s(link) > explained_s
        ]

    def _behind_s(self, known: _Link) -> float:
        # The newest is the usual case; the oldest that is remembered stands for those before it.
        if not self._first_echo_s or self._first_echo_s[-1][0] <= known.newest:
            return 0.0
        since_s = next(at_s for ping, at_s in self._first_echo_s if ping > known.newest)
        return self._awake_s - since_s
