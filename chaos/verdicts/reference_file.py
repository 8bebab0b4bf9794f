"""Answers without faults on disk: an oracle from another day, for the same requests to the same model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from chaos.record.operations import ExpectedChoice, Reference


class StoredReferenceError(Exception):
    """The file is none, or is of other requests; names the file."""


def write_reference(path: Path, fingerprint: str, reference: Reference) -> None:
    """`fingerprint`: of the requests and the model's name."""
    answers = {name: [asdict(choice) for choice in choices] for name, choices in sorted(reference.items())}
    path.write_text(json.dumps({"fingerprint": fingerprint, "answers": answers}) + "\n", encoding="utf-8")


def read_reference(path: Path, fingerprint: str) -> dict[str, tuple[ExpectedChoice, ...]]:
    """Raises StoredReferenceError if the file cannot be read or was made for something else."""
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
