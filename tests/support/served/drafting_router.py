"""A router that knows answers and drafts them, with errors: `python -m tests.support.served.drafting_router FILE`.

FILE: JSON, [[prompt, answer], ...] in token ids. Every fourth guess is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.router import service
from services.router.__main__ import main
from services.router.scheduling.scheduler import Scheduler
from tests.support.router.erring_drafter import RecordedDrafter

RATE = 0.75
MOST_TOKENS = 5


def modules_for(answers: Sequence[tuple[Sequence[int], Sequence[int]]], folder: Path) -> dict[str, str]:
    """What `served_mesh(modules=...)` is given for a router that drafts these. `answers`: prompt and answer."""
    path = folder / "answers.json"
    path.write_text(json.dumps([[list(prompt), list(answer)] for prompt, answer in answers]))
    return {"router": f"tests.support.served.drafting_router {path}"}


def drafting_scheduler(answers: list[tuple[list[int], list[int]]]) -> Any:
    """Makes a scheduler with another drafter than it is given."""

    def make(*args: Any, **options: Any) -> Scheduler:
        options["drafter"] = RecordedDrafter(answers, MOST_TOKENS, RATE)
        return Scheduler(*args, **options)

    return make


if __name__ == "__main__":
    recorded = json.loads(Path(sys.argv[1]).read_text())
    setattr(service, "Scheduler", drafting_scheduler(recorded))  # noqa: B010
    sys.exit(main())
