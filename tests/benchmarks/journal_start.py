"""How long a router that was restarted reads its journal before it answers.

    python -m tests.benchmarks.journal_start --requests 10000 --unfinished 500

Writes a journal of that many requests with a prompt and tokens each, then opens it as `services/router/service.py`
does, up to the moment in which the router serves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry

from common.ids import RequestId, SequenceId
from compose.tiny_checkpoint import write_tiny_checkpoint
from services.router.front.routes import create_app
from services.router.front.settings import FrontSettings
from services.router.front.text.tokenizer import TextTokenizer
from services.router.service import RESTORE_WITHIN_S
from tests.support.front.fake_engine import FakeEngine, Pause
from tests.support.front.journals import accepted, open_at, token

TOKENS_A_STEP = 64


def write_journal(path: Path, num_requests: int, num_unfinished: int, prompt_bytes: int, num_tokens: int) -> None:
    """`num_unfinished` of them have not ended."""
    journal, _ = open_at(path)
    body = json.dumps({"model": "tiny", "prompt": "hi " * (prompt_bytes // 3), "max_tokens": num_tokens + 1}).encode()
    for number in range(num_requests):
        name = f"cmpl-{number}"
        journal.accept(accepted(name, body=body, choice_ids=(RequestId(f"{name}-0"),))).result(0)
        journal.note_placement(RequestId(f"{name}-0"), SequenceId(number))
        for first in range(0, num_tokens, TOKENS_A_STEP):
            count = min(TOKENS_A_STEP, num_tokens - first)
            journal.append([(RequestId(f"{name}-0"), token(first + each)) for each in range(count)])
        if number >= num_unfinished:
            journal.end(name, is_kept=True)
        journal.tick()
    journal.close()


async def start(path: Path, checkpoint: Path, num_bytes: int) -> None:
    """Prints the times of what `serve` does before it serves."""
    tokenizer = TextTokenizer.from_directory(checkpoint)
    began_s = time.perf_counter()
    journal, journalled = open_at(path)
    read_s = time.perf_counter()
    engine = FakeEngine(script=[Pause()])
    app = create_app(engine, tokenizer, FrontSettings("tiny"), CollectorRegistry(), journal=journal)
    app.state.requests.restore(journalled)
    found_s = time.perf_counter()
    going_on = asyncio.create_task(app.state.requests.go_on())
    await asyncio.wait({going_on}, timeout=RESTORE_WITHIN_S)
    serves_s = time.perf_counter()
    in_line = len(engine.resumed)
    await going_on
    print(
        f"{len(journalled)} requests, {num_bytes / 1e6:.0f} MB: read in {read_s - began_s:.2f} s, can be "
        f"found after {found_s - began_s:.2f} s, served after {serves_s - began_s:.2f} s with {in_line} of "
        f"{len(engine.resumed)} unfinished ones in line; the last one after {time.perf_counter() - began_s:.2f} s"
    )
    await app.state.requests.close()
    journal.close()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--unfinished", type=int, default=0)
    parser.add_argument("--prompt-bytes", type=int, default=4_000)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(Path(folder) / "tiny")
        path = Path(folder) / "journal.sqlite3"
        write_journal(path, options.requests, options.unfinished, options.prompt_bytes, options.tokens)
        asyncio.run(start(path, checkpoint, path.stat().st_size))


if __name__ == "__main__":
    main()
