"""`python -m services.router`: the router of one mesh."""

from __future__ import annotations

import asyncio
import os
import sys

from common.processes.quick_imports import quick_imports

with quick_imports():
    from common.config import read_settings
    from common.node.process import run_process
    from services.router.service import serve


def main() -> int:
    """Exit status 0 after an orderly stop, 1 with a sentence when it cannot go on."""
    return run_process("router", os.environ.get("LOG_LEVEL", "info"), lambda log: asyncio.run(serve(read_settings())))


if __name__ == "__main__":
    sys.exit(main())
