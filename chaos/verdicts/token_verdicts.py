"""Whether every stream got exactly what it gets without faults. Pure: operations and reference in, verdicts out."""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from chaos.record.operations import ChoiceRecord, Operation
from chaos.record.reference import Reference
from chaos.verdicts.verdict import Verdict, verdict_of


def token_verdicts(operations: Sequence[Operation], reference: Reference) -> list[Verdict]:
    """Judges what was asked under faults. Without a single whole answer that can be compared all is unknown."""
    # What is wrong, a sentence each, by the verdict that it breaks.
    damage = defaultdict[str, list[str]](list)
    num_tokens = num_whole = 0
    doubts = []
    for operation in operations:
        expected = reference.get(operation.request)
        if expected is None:
            doubts.append(f"{operation.name}: there is no answer without faults to {operation.request}")
            continue
        num_whole += operation.is_whole
        num_tokens += operation.num_tokens
        for index, (got, wanted) in enumerate(zip(operation.choices, expected, strict=True)):
            for verdict, sentence in _compare(got, wanted, operation.is_whole):
                damage[verdict].append(f"{operation.name} choice {index}: {sentence}")
    if not num_whole:
        doubts.append("no answer that was asked under faults came to its end")
    figures = {"tokens": float(num_tokens), "whole_answers": float(num_whole)}
    same = f"{num_tokens} tokens of {num_whole} whole answers are those of the run without faults"
    return [
        verdict_of("tokens_lost", damage["tokens_lost"], doubts, same, figures),
        verdict_of("tokens_doubled", damage["tokens_doubled"], doubts, same, figures),
        verdict_of("tokens_changed", damage["tokens_changed"], doubts, same, figures),
        verdict_of("logprobs", damage["logprobs"], doubts, f"the log-probabilities of {num_tokens} tokens, bit by bit"),
        verdict_of("ends", damage["ends"], doubts, f"finish reasons and texts of {num_whole} answers"),
    ]


def _compare(got: ChoiceRecord, wanted: ChoiceRecord, is_whole: bool) -> Iterator[tuple[str, str]]:
    """Yields (verdict, sentence) for each thing that is wrong with a choice."""
    tokens = got.token_ids
    # An answer that broke off may be short; what it has must still be the beginning.
    expected = wanted.token_ids if is_whole else wanted.token_ids[: len(tokens)]
    if tokens != expected:
        yield from _classify(tokens, expected)
    same = _common_length(tokens, wanted.token_ids)
    for offset in range(same):
        bits = got.logprob_bits[offset : offset + 1]
        if bits != wanted.logprob_bits[offset : offset + 1]:
            yield "logprobs", f"token {offset} has {bits}, not {wanted.logprob_bits[offset]}"
            break
    if is_whole and got.reason != wanted.reason:
        yield "ends", f"ended with {got.reason!r}, not {wanted.reason!r}"
    if is_whole and got.text_sha256 != wanted.text_sha256:
        yield "ends", "another text"


def _classify(got: Sequence[int], expected: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Tells the shortest story that makes `got` out of `expected`."""
    matcher = difflib.SequenceMatcher(None, expected, got, autojunk=False)
    for tag, from_expected, to_expected, from_got, to_got in matcher.get_opcodes():
        if tag == "delete":
            yield "tokens_lost", f"tokens {from_expected} to {to_expected - 1} are missing"
        elif tag == "insert":
            extra = list(got[from_got:to_got])
            neighbours = (
                (got[from_got - len(extra) : from_got] if from_got >= len(extra) else ()),
                (got[to_got : to_got + len(extra)]),
            )
            is_again = any(list(neighbour) == extra for neighbour in neighbours)
            verdict = "tokens_doubled" if is_again else "tokens_changed"
            yield verdict, f"{len(extra)} tokens {'again' if is_again else 'too many'} at {from_got}"
        elif tag == "replace":
            yield (
                "tokens_changed",
                f"at {from_expected} there is {list(got[from_got : from_got + 4])}, "
                f"not {list(expected[from_expected : from_expected + 4])}",
            )


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def salt_verdict(operations: Sequence[Operation]) -> Verdict:
    """Judges whether something was found for those that had a salt of their own."""
    salted = [operation for operation in operations if operation.is_salted and operation.is_whole]
    damage = [f"{o.name}: {o.num_found_tokens} tokens of its prompt were found" for o in salted if o.num_found_tokens]
    num_found = sum(o.num_found_tokens for o in operations)
    doubts = [] if salted and num_found else ["nothing was found for anybody, or nobody had a salt"]
    held = f"nothing was found for {len(salted)} requests with a salt of their own, {num_found} tokens for others"
    return verdict_of("salts", damage, doubts, held, {"found_tokens": float(num_found)})


def end_verdicts(operations: Sequence[Operation], max_refused: int | None) -> list[Verdict]:
    """Judges errors, hung requests, and refusals of new requests; `max_refused` None allows any number of these."""
    asked = [] if operations else ["nothing was asked under faults"]
    errors = [f"{o.name}: {o.failure}" for o in operations if o.how == "failed"]
    hung = [f"{o.name}: {o.failure or 'had not ended when the run ended'}" for o in operations if _is_hung(o)]
    refused = [f"{o.name}: refused {o.num_refused} times" for o in operations if o.num_refused]
    num_refused = sum(o.num_refused for o in operations)
    is_too_much = max_refused is not None and num_refused > max_refused
    figures = {
        "requests": float(len(operations)),
        "broken_connections": float(sum(o.num_breaks for o in operations)),
        "reattached": float(sum(o.num_reattached for o in operations)),
    }
    return [
        verdict_of("errors", errors, asked, f"none of {len(operations)} requests ended with an error", figures),
        verdict_of("hung", hung, asked, f"each of {len(operations)} requests came to an end"),
        verdict_of(
            "refused",
            refused if is_too_much else [],
            asked,
            f"{num_refused} refusals of new requests",
            {"refused": float(num_refused)},
        ),
    ]


def _is_hung(operation: Operation) -> bool:
    return operation.how in ("hung", "abandoned")


def digest_with_faults(operations: Iterable[Operation]) -> str:
    """Returns SHA-256 over all token ids that came under faults, operation by operation."""
    return _digest((o.name, [c.token_ids for c in o.choices]) for o in operations)


def digest_without_faults(operations: Iterable[Operation], reference: Reference) -> str:
    """Returns SHA-256 over what should have come.

    It is equal to `digest_with_faults` if and only if every token is right and every answer whole.
    """
    return _digest((o.name, [c.token_ids for c in reference.get(o.request, ())]) for o in operations)


def _digest(answers: Iterable[tuple[str, Sequence[Sequence[int]]]]) -> str:
    sha256 = hashlib.sha256()
    for name, choices in sorted(answers):
        for index, token_ids in enumerate(choices):
            sha256.update(f"{name} {index} {' '.join(map(str, token_ids))}\n".encode())
    return sha256.hexdigest()
