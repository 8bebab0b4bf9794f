"""A journal that is compacted, opened again or out of room when a test wants it."""

from __future__ import annotations

import struct
from pathlib import Path

from common.ids import RequestId
from services.router.engine import Token
from services.router.journal.journal import Journal
from services.router.journal.records import JournalledRequest
from tests.support.front.journals import open_at, token


def is_durable(journal: Journal) -> bool:
    """Whether everything that was handed in so far is written."""
    return not journal._queue.backlog and not journal._writer.is_lost


def compact(journal: Journal) -> None:
    journal._next_compaction_s = 0.0
    journal.tick()


def reopened(path: Path) -> list[JournalledRequest]:
    journal, requests = open_at(path)
    journal.close()
    return requests


def bits(tokens: list[Token]) -> list[tuple[int, bytes | None, bytes]]:
    def packed(value: float) -> bytes:
        return struct.pack("<d", value)

    return [
        (
            each.token_id,
            None if each.logprob is None else packed(each.logprob),
            b"".join(struct.pack("<q", other) + packed(value) for other, value in each.top_logprobs),
        )
        for each in tokens
    ]


def limit_pages(journal: Journal, num_pages: int) -> None:
    """A disk that is full after so many pages."""
    journal._writer._store._connection.execute(f"PRAGMA max_page_count = {num_pages}")


def fill(journal: Journal, request_id: str, first: int = 0, limit: int = 5000) -> int:
    """Append until the disk takes no more; how many tokens were handed in."""
    number = first
    while is_durable(journal):
        assert number < limit
        journal.append([(RequestId(request_id), token(number))])
        number += 1
    return number
