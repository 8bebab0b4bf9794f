"""`python -m tests.support.processes.dying_router 77 78`: a router that dies over prompts that begin with these.

Over the first when it plans a step of it; over the second when its second token comes to the front, whether the mesh
has made it or the journal has it. As an error in native code would do it: nothing of Python's runs any more.
"""

from __future__ import annotations

import os
import signal
import sys
from unittest import mock

from services.router.__main__ import main
from services.router.engine import Token
from services.router.front.live_request import LiveChoice
from services.router.scheduling.request import Request

if __name__ == "__main__":
    deadly_to_plan, deadly_to_read = map(int, sys.argv[1:])
    original, accept = Request.token_ids, LiveChoice.accept

    def token_ids(request: Request, start: int, stop: int) -> tuple[int, ...]:
        if request.generation_request.prompt_token_ids[0] == deadly_to_plan:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(request, start, stop)

    def accept_token(choice: LiveChoice, token: Token) -> None:
        if choice.tokens and choice.planned.request.prompt_token_ids[0] == deadly_to_read:
            os.kill(os.getpid(), signal.SIGKILL)
        accept(choice, token)

    with mock.patch.object(Request, "token_ids", token_ids), mock.patch.object(LiveChoice, "accept", accept_token):
        sys.exit(main())
