"""The answers without faults, which are right: from the history of a run, or from a file of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos.record.operations import ChoiceRecord, Operation

Reference = Mapping[str, Sequence[ChoiceRecord]]
"""The choices of each request in order, by its name."""


class StoredReferenceError(Exception):
    """The file is not a reference, or is one of other requests. It names the file."""


def reference_of(operations: Iterable[Operation]) -> dict[str, list[ChoiceRecord]]:
    """Returns the answers to what was asked in the phase `reference`, as far as they are whole."""
    return {o.request: o.choices for o in operations if o.phase == "reference" and o.is_whole}


def write_reference(path: Path, fingerprint: str, reference: Reference) -> None:
    """Writes the answers for a later run. `fingerprint` is that of the requests and the model's name."""
    answers = {name: [asdict(choice) for choice in choices] for name, choices in sorted(reference.items())}
    path.write_text(json.dumps({"fingerprint": fingerprint, "answers": answers}) + "\n", encoding="utf-8")


def read_reference(path: Path, fingerprint: str) -> dict[str, list[ChoiceRecord]]:
    """Reads answers. Raises StoredReferenceError if the file cannot be read or was made for something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found, answers = document["fingerprint"], document["answers"]
        reference = {name: [_choice(choice) for choice in choices] for name, choices in answers.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoredReferenceError(f"{path} is not a reference: {error}") from error
    if found != fingerprint:
        raise StoredReferenceError(f"{path} was made for other requests, another seed or another model")
    return reference


def _choice(stored: Mapping[str, Any]) -> ChoiceRecord:
    return ChoiceRecord(stored["token_ids"], stored["logprob_bits"], stored["reason"], stored["text_sha256"])
