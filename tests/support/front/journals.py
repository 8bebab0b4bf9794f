"""Journals for tests: entries, tokens with awkward bits, and a log that says nothing."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from common.ids import RequestId
from services.router.engine import FinishReason, Token
from services.router.journal.disk_thread import DiskThread
from services.router.journal.journal import Journal, open_journal
from services.router.journal.records import AcceptedRequest, JournalledRequest
from tests.support.front.disks import PromptDisk

MODEL = "print float32"
AWKWARD = (-0.0, 0.0, -1e-45, -0.1, float("-inf"), -87.33654, struct.unpack("<f", b"\x01\x00\x80\xbf")[0])


def accepted(name: str, num_choices: int = 1, **changes: Any) -> AcceptedRequest:
    """A resumable one, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "reply_id": name,
        "created_s": 5,
        "accepted_s": 5.5,
        "route": "completions",
        "tenant": "t",
        "client_request_id": f"client-{name}",
        "idempotency_key": None,
        "body_hash": "h",
        "body": b'{"prompt": "hi"}',
        "seed": 2**63 - 1,
        "is_resumable": True,
        "choice_ids": tuple(RequestId(f"{name}-{index}") for index in range(num_choices)),
    }
    return AcceptedRequest(**(fields | changes))


def token(number: int, finish_reason: FinishReason | None = None) -> Token:
    """Its log-probabilities follow from its number."""
    logprob = AWKWARD[number % len(AWKWARD)]
    return Token(number, logprob, ((number + 1, logprob), (number + 2, -3.5)), finish_reason)


def measured(journal: Journal, name: str) -> float:
    """The metric `moemesh_NAME` of a journal."""
    (value,) = (family.samples[0].value for family in journal.collect() if family.name == f"moemesh_{name}")
    return value


def open_at(
    path: Path, model: str = MODEL, disk: DiskThread | None = None, **changes: Any
) -> tuple[Journal, list[JournalledRequest]]:
    """The journal of a test, with a term that is never old; without a disk of its own it is written at once."""
    settings: dict[str, Any] = {"is_synchronous": False, "retention_s": 600.0} | changes
    return open_journal(path, model, lambda: None, disk or PromptDisk(), **settings)
