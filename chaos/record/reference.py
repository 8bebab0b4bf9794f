"""The answers without faults, which are right: from the history of a run, or from a file of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.record.operations import Operation


@dataclass(frozen=True, slots=True)
class ExpectedChoice:
    """What a choice must be: what it is without faults."""

    token_ids: tuple[int, ...]
    logprob_bits: tuple[str, ...]
    reason: str
    text_sha256: str


Reference = Mapping[str, tuple[ExpectedChoice, ...]]
"""The choices of each request in order, by its name."""


class StoredReferenceError(Exception):
    """The file is none, or is of other requests. It names the file."""


def reference_of(operations: Iterable[Operation]) -> dict[str, tuple[ExpectedChoice, ...]]:
    """Returns the answers to what was asked in the phase `reference`, as far as they are whole."""
    return {
        operation.request: tuple(
            ExpectedChoice(tuple(c.token_ids), tuple(c.logprob_bits), c.reason, c.text_sha256)
            for c in operation.choices
        )
        for operation in operations
        if operation.phase == "reference" and operation.is_whole
    }


def write_reference(path: Path, fingerprint: str, reference: Reference) -> None:
    """Writes the answers for a later run. `fingerprint` is that of the requests and the model's name."""
    answers = {name: [asdict(choice) for choice in choices] for name, choices in sorted(reference.items())}
    path.write_text(json.dumps({"fingerprint": fingerprint, "answers": answers}) + "\n", encoding="utf-8")


def read_reference(path: Path, fingerprint: str) -> dict[str, tuple[ExpectedChoice, ...]]:
    """Reads answers. Raises StoredReferenceError if the file cannot be read or was made for something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found, answers = document["fingerprint"], document["answers"]
        reference = {name: tuple(_choice(choice) for choice in choices) for name, choices in answers.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoredReferenceError(f"{path} is no reference: {error}") from error
    if found != fingerprint:
        raise StoredReferenceError(f"{path} was made for other requests, another seed or another model")
    return reference


def _choice(fields: dict[str, object]) -> ExpectedChoice:
    return ExpectedChoice(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})  # type: ignore[arg-type]
