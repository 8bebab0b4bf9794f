"""An expert node whose every grouped call takes a fixed time, whatever the processor does.

    python -m tests.benchmarks.fixed_time_expert MILLISECONDS

So a node that dies gives no processor back to the others, as on machines of their own. It answers rightly; it only
waits.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from services.expert import calls, service
from services.expert.__main__ import main


def wait_out(milliseconds: float) -> None:
    """From now on, answering a layer's calls takes so long."""
    begin_answer = calls.begin_answer

    def timed(*arguments: Any) -> Any:
        began_s = time.monotonic()
        answer = begin_answer(*arguments)
        time.sleep(max(0.0, milliseconds / 1000 - (time.monotonic() - began_s)))
        return answer

    vars(service)["begin_answer"] = timed


if __name__ == "__main__":
    wait_out(float(sys.argv[1]))
    sys.exit(main())
