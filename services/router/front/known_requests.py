"""The requests that the front knows, by each of their names; each as it runs, as it rests, or both. No I/O."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from common.errors import MoemeshError, NotReadyError, OverloadedError
from services.router.front.live_request import ClientIdentity, LiveRequest
from services.router.journal.records import AcceptedRequest, JournalledChoice, JournalledRequest, encode_tokens


@dataclass(slots=True, eq=False)
class KnownRequest:
    """`live`, `resting` or both: one that has ended and is being read is both."""

    accepted: AcceptedRequest
    is_kept: bool
    number: int
    """Ascends with acceptance: of two with one name the newer counts, in whichever order a restart brings them back."""
    num_bytes: int
    """By which it counts in the bounds."""
    live: LiveRequest | None = None
    resting: JournalledRequest | None = None
    is_restored: bool = False
    """A router before this one has accepted it."""
    receipt: int = 0
    """The journal's, of its tokens, once it has ended."""
    timer: asyncio.TimerHandle | None = None
    """Until it is cancelled for want of listeners, or forgotten after its end."""
    waking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def identity(self) -> ClientIdentity:
        """Whose it is."""
        accepted = self.accepted
        return ClientIdentity(
            accepted.tenant, accepted.client_request_id, accepted.idempotency_key, accepted.is_resumable
        )

    @property
    def ended_s(self) -> float | None:
        """Wall clock; None if it has not ended."""
        return None if self.resting is None else self.resting.ended_s

    @property
    def has_failed(self) -> bool:
        """It ended with an error: a retry with its key is to have another chance."""
        return self.resting is not None and any(choice.error is not None for choice in self.resting.choices)

    @property
    def is_unfinished(self) -> bool:
        """Restored, and its turn to go on has not come."""
        return self.live is None and self.ended_s is None

    @property
    def goes_on_after(self) -> tuple[bool, int]:
        """Order of unfinished ones: those that had a place in a pipeline first, then by acceptance."""
        has_place = self.resting is not None and any(choice.sequence_id is not None for choice in self.resting.choices)
        return not has_place, self.number


class KnownRequests:
    """By reply id; by a tenant's own id and key, of which the newest counts."""

    def __init__(self) -> None:
        self._by_id: dict[str, KnownRequest] = {}
        self._by_client_id: dict[tuple[str, str], KnownRequest] = {}
        self._by_key: dict[tuple[str, str], KnownRequest] = {}
        self.last_number = 0

    def get(self, reply_id: str) -> KnownRequest | None:
        """Whosever it is."""
        return self._by_id.get(reply_id)

    def find(self, tenant: str, request_id: str) -> KnownRequest | None:
        """By the reply's id or the client's own, if it is this tenant's."""
        known = self._by_id.get(request_id)
        if known is None or known.accepted.tenant != tenant:
            known = self._by_client_id.get((tenant, request_id))
        return known

    def find_by_key(self, identity: ClientIdentity) -> KnownRequest | None:
        """None without a key, too."""
        return self._by_key.get((identity.tenant, identity.idempotency_key or ""))

    def all(self) -> list[KnownRequest]:
        """A copy."""
        return list(self._by_id.values())

    def add(self, known: KnownRequest) -> None:
        """Under all of its names."""
        accepted = known.accepted
        self.last_number = max(self.last_number, known.number)
        self._by_id[accepted.reply_id] = known
        for name, by_name in (
            (accepted.client_request_id, self._by_client_id),
            (accepted.idempotency_key, self._by_key),
        ):
            if name is not None and by_name.setdefault((accepted.tenant, name), known).number < known.number:
                by_name[accepted.tenant, name] = known

    def remove(self, known: KnownRequest) -> bool:
        """False if it was not here."""
        if self._by_id.get(known.accepted.reply_id) is not known:
            return False
        del self._by_id[known.accepted.reply_id]
        name = (known.accepted.tenant, known.accepted.client_request_id or "")
        if self._by_client_id.get(name) is known:
            del self._by_client_id[name]
        self.forget_key(known)
        return True

    def forget_key(self, known: KnownRequest) -> None:
        """A request with the same key is another one from now on."""
        key = (known.accepted.tenant, known.accepted.idempotency_key or "")
        if self._by_key.get(key) is known:
            del self._by_key[key]


def was_refused(known: KnownRequest, live: LiveRequest) -> bool:
    """The mesh has not taken it at all: nothing of it is worth being kept."""
    is_refusal = isinstance(live.error, OverloadedError | NotReadyError)
    return is_refusal and not known.is_restored and not any(choice.tokens for choice in live.choices)


def packed(live: LiveRequest, error: MoemeshError | None) -> tuple[JournalledChoice, ...]:
    """Its choices as they rest; the first one has what the request failed by."""
    return tuple(
        JournalledChoice([(0, encode_tokens(choice.tokens))], error=error if choice is live.choices[0] else None)
        for choice in live.choices
    )
