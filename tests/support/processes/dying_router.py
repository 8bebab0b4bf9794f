"""`python -m tests.support.processes.dying_router 77`: a router that dies when it plans a prompt that begins with it.

As an error in native code would do it: nothing of Python's runs any more.
"""

from __future__ import annotations

import os
import signal
import sys
from unittest import mock

from services.router.__main__ import main
from services.router.scheduling.request import Request

if __name__ == "__main__":
    deadly = int(sys.argv[1])
    original = Request.token_ids

    def token_ids(request: Request, start: int, stop: int) -> tuple[int, ...]:
        if request.generation_request.prompt_token_ids[0] == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(request, start, stop)

    with mock.patch.object(Request, "token_ids", token_ids):
        sys.exit(main())
