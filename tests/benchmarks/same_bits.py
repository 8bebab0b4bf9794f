"""Whether two builds say the same to the last bit: hashes of tokens and log-probabilities of 64 requests, by layout.

    python -m tests.benchmarks.same_bits --checkout ../before --output before.json
    python -m tests.benchmarks.same_bits --output after.json --compare before.json
    python -m tests.benchmarks.same_bits --read after.json --compare before.json   # no mesh is started

Each layout of each model is a mesh that is started by the checkout's own command and asked all requests at once, over
HTTP. Floats are compared by the bits that their printed form stands for; Python prints them without loss. Prints a hash
for each mesh. With --compare it names each request whose answer differs, and ends with status 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compose.demo_checkpoint import DEMO_CHECKPOINT
from compose.tiny_checkpoint import Family, write_tiny_checkpoint
from tests.benchmarks.bit_requests import BitRequest, bit_requests
from tests.benchmarks.checkout_mesh import THIS_CHECKOUT, checkout_mesh, command_of, commit_of
from tests.benchmarks.machine import describe_machine
from tests.support.served.mesh_client import MeshClient, mesh_client

LAYOUTS: dict[str, dict[str, str]] = {
    "PP 1, EXPERTS 1": {"PP": "1", "EXPERTS": "1"},
    "PP 2, EXPERTS 3": {"PP": "2", "EXPERTS": "3"},
    "PP 1, TP 2": {"PP": "1", "TP": "2", "EXPERTS": "2"},
    "two pipelines, a spare, slices": {
        "PP": "2",
        "STAGES": "5",
        "SPARES": "1",
        "EXPERTS": "4",
        "EXPERT_SLICES": "2",
    },
    "PP 2, TP 4": {"PP": "2", "TP": "4"},
    "PP 1, TP 2, fast": {"PP": "1", "TP": "2", "TP_REDUCE": "fast"},
    "PP 1, TP 4, fast": {"PP": "1", "TP": "4", "TP_REDUCE": "fast"},
    "PP 2, bfloat16": {"PP": "2", "DTYPE": "bfloat16"},
}
MODELS = (*(family.value for family in Family), "demo")
REPLY_WITHIN_S = 600
PARTS = ("token_ids", "logprobs", "text")
"""Of an answer, in the order in which differences are looked for."""

Answer = dict[str, Any]
"""By part: the choices' token ids as they are, the other two as hashes."""
Meshes = dict[str, dict[str, Any]]
"""By name of model and layout: `hash`, `model_hash` and `answers` by request."""


def exact(value: Any) -> Any:
    """Returns a JSON value with each float in the form that shows its bits."""
    match value:
        case float():
            return value.hex()
        case dict():
            return {key: exact(item) for key, item in value.items()}
        case list():
            return [exact(item) for item in value]
    return value


def hash_of(value: Any) -> str:
    """Returns a hash that is equal where every bit of a JSON value is."""
    return hashlib.sha256(json.dumps(exact(value), sort_keys=True).encode()).hexdigest()[:32]


def messages_of(reply: str, is_stream: bool) -> list[dict[str, Any]]:
    """Returns the JSON objects of a reply's body: one, or one for each event of a stream.

    Raises RuntimeError if a stream ended with an error or broke off.
    """
    if not is_stream:
        return [json.loads(reply)]
    events = [event.removeprefix("data: ") for event in reply.split("\n\n") if event.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise RuntimeError(f"the stream broke off: {reply[-500:]}")
    messages = [json.loads(event) for event in events[:-1]]
    for message in messages:
        if "error" in message:
            raise RuntimeError(f"the stream ended with an error: {message['error']}")
    return messages


def answer_of(messages: Iterable[Mapping[str, Any]]) -> Answer:
    """Puts the pieces of each choice together: how a stream was cut up does not count."""
    choices: dict[int, Answer] = {}
    for message in messages:
        for piece in message["choices"]:
            choice = choices.setdefault(piece["index"], {"token_ids": [], "logprobs": {}, "text": [], "end": None})
            choice["token_ids"] += [*(piece.get("prompt_token_ids") or ()), *(piece.get("token_ids") or ())]
            _append_logprobs(choice["logprobs"], piece.get("logprobs") or {})
            said = piece.get("text") or (piece.get("delta") or piece.get("message") or {}).get("content")
            choice["text"].append(said or "")
            choice["end"] = piece.get("finish_reason") or choice["end"]
    ordered = [choices[index] for index in sorted(choices)]
    return {
        "token_ids": [choice["token_ids"] for choice in ordered],
        "logprobs": hash_of([choice["logprobs"] for choice in ordered]),
        "text": hash_of([["".join(choice["text"]), choice["end"]] for choice in ordered]),
    }


def _append_logprobs(known: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Each field is a list with an entry for each token, or null where nothing was asked for."""
    for name, entries in more.items():
        if entries is not None:
            known.setdefault(name, []).extend(entries)


def difference(before: Answer, after: Answer) -> str:
    """Returns in words where two answers to one request part, or nothing if every bit is equal."""
    pairs = zip(before["token_ids"], after["token_ids"], strict=False)
    for number, (old, new) in enumerate(pairs):
        if old != new:
            place = next((i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), None)
            where = f"at token {place}" if place is not None else f"in length, {len(old)} and {len(new)}"
            return f"tokens of choice {number} differ {where}"
    parts = [part for part in PARTS if before[part] != after[part]]
    return f"{' and '.join(parts)} differ" if parts else ""


def compare(before: Meshes, after: Meshes) -> list[str]:
    """Returns a sentence for each request that differs, and for what of `after` is not in `before`."""
    sentences = []
    for mesh, found in after.items():
        if mesh not in before:
            sentences.append(f"{mesh}: not in the file to compare with")
        elif before[mesh]["model_hash"] != found["model_hash"]:
            sentences.append(f"{mesh}: the checkpoints differ, and nothing can be compared")
        else:
            old, new = before[mesh]["answers"], found["answers"]
            sentences += [f"{mesh}: {name}: asked of one build only" for name in sorted(old.keys() ^ new.keys())]
            parted = {name: difference(old[name], new[name]) for name in new if name in old}
            sentences += [f"{mesh}: {name}: {words}" for name, words in parted.items() if words]
    return sentences


def ask(client: MeshClient, request: BitRequest) -> Answer:
    """Raises RuntimeError with the server's words if it refuses the request or breaks off."""
    reply = client.post(request.path, request.body | {"model": client.model})
    if reply.is_error:
        raise RuntimeError(f"{request.name}: HTTP {reply.status_code}: {reply.text}")
    return answer_of(messages_of(reply.text, bool(request.body.get("stream"))))


def measure(checkout: Path, settings: Mapping[str, str], model: Path) -> dict[str, Any]:
    """Returns what a mesh that is started for it answers to all requests at once."""
    requests = bit_requests()
    with (
        checkout_mesh(checkout, {"MODEL": str(model), **settings}) as mesh,
        mesh_client(mesh.url, REPLY_WITHIN_S) as client,
        ThreadPoolExecutor(len(requests)) as pool,
    ):
        _ = client.model  # once here, not by every thread
        replies = pool.map(lambda request: ask(client, request), requests)
        answers = {request.name: answer for request, answer in zip(requests, replies, strict=True)}
    return {"hash": hash_of(answers), "model_hash": files_hash(model), "answers": answers}


def files_hash(directory: Path) -> str:
    """Returns a hash of all files that a checkpoint consists of."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def run(checkout: Path, models: Sequence[str], layouts: Sequence[str]) -> Meshes:
    """Starts one mesh after another."""
    found: Meshes = {}
    with tempfile.TemporaryDirectory(prefix="bits-") as folder:
        for model in models:
            path = DEMO_CHECKPOINT if model == "demo" else write_tiny_checkpoint(Path(folder) / model, Family(model))
            for layout in layouts:
                name = f"{model}, {layout}"
                found[name] = measure(checkout, LAYOUTS[layout], path)
                print(f"{found[name]['hash']}  {name}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the module says."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.same_bits", description=__doc__)
    parser.add_argument("--checkout", type=Path, default=THIS_CHECKOUT, help="whose mesh is asked; default: this one")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--output", type=Path, help="write JSON there")
    parser.add_argument("--read", type=Path, metavar="JSON", help="what an earlier run wrote, in place of a run")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="what an earlier run wrote of another build")
    parsed = parser.parse_args(arguments)
    # What is wrong with these is said now, not after minutes.
    before: Meshes | None = json.loads(parsed.compare.read_text())["meshes"] if parsed.compare else None
    if parsed.read:
        found: Meshes = json.loads(parsed.read.read_text())["meshes"]
    else:
        command_of(parsed.checkout)
        commit = commit_of(parsed.checkout)
        found = run(parsed.checkout, parsed.models, parsed.layouts)
        if parsed.output:
            document = {"machine": asdict(describe_machine()), "commit": commit, "meshes": found}
            parsed.output.write_text(json.dumps(document) + "\n")
    if before is None:
        return 0
    sentences = compare(before, found)
    print("\n".join(sentences) or f"the same bits: {len(found)} meshes, {len(bit_requests())} requests each")
    return 1 if sentences else 0


if __name__ == "__main__":
    raise SystemExit(main())
