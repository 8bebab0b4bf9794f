"""`python -m services.expert`: one anonymous expert node."""

from __future__ import annotations

import os

from common.giving_way import giving_way


def main() -> int:
    """Exit status 0 after an orderly stop, 1 with a sentence when it cannot go on."""
    with giving_way():  # the imports are most of a start
        from common.config import read_settings
        from common.node_process import run_process
        from services.expert.process import serve
    return run_process("expert", os.environ.get("LOG_LEVEL", "info"), lambda log: serve(read_settings(), log))


if __name__ == "__main__":
    from common.node_process import end_process

    end_process(main())
