"""`python -m services.stage.ranks`: one rank of a stage, started by the stage itself."""

from __future__ import annotations

import os

from common.node.process import end_process, run_process
from services.stage.ranks.worker import serve_rank

if __name__ == "__main__":
    end_process(run_process("stage", os.environ.get("LOG_LEVEL", "info"), serve_rank))
