"""The process that computes placements: `python -m services.router.mesh.placement_process PARENT`, the router's child.

Requests come on stdin, answers go to stdout. It ends when the router does, whose process id PARENT is.
"""

from __future__ import annotations

import signal
import sys
from typing import BinaryIO

from common.processes.child_process import end_with_parent
from services.router.control.experts.placing import answer_request
from services.router.mesh.placement_codec import LENGTH, decode_request, encode_answer


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Until the requests end."""
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        request = decode_request(requests.read(LENGTH.unpack(head)[0]))
        answers.write(encode_answer(answer_request(request)))
        answers.flush()


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the router's to answer
    serve(sys.stdin.buffer, sys.stdout.buffer)
