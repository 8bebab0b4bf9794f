"""`python -m common.processes.fork_child SOCKET MODULE...`: the process that imports and forks; see fork_server."""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

import msgpack

from common.processes.child_process import end_with_parent, name_process
from common.processes.quick_imports import quick_imports

MAX_MESSAGE_BYTES = 1 << 17
MAX_DESCRIPTORS = 8
READY = {"ready": True}


def main() -> NoReturn:
    """Import, then fork for the process that holds the other end, until it lets go."""
    link = socket.socket(fileno=int(sys.argv[1]))
    with quick_imports():
        for module in sys.argv[2:]:
            importlib.import_module(module)
    serve_forks(link)


def serve_forks(link: socket.socket) -> NoReturn:
    """The loop. This process must have one thread: others would be missing from a fork with their locks held."""
    name_process("moemesh-forks")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with its maker
    gc.freeze()  # what is imported stays as it is, so that its pages stay shared
    selector = selectors.DefaultSelector()
    selector.register(link, selectors.EVENT_READ)
    processes: dict[int, int] = {}
    """Process by its descriptor."""
    try:
        link.send(msgpack.packb(READY))
        while True:
            for key, _ in selector.select():
                descriptor = key.fd
                if descriptor != link.fileno():
                    selector.unregister(descriptor)
                    os.close(descriptor)
                    pid, status = os.waitpid(processes.pop(descriptor), 0)
                    link.send(msgpack.packb({"ended": pid, "status": os.waitstatus_to_exitcode(status)}))
                    continue
                data, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS)
                if not data:
                    os._exit(0)
                forked = _fork(
                    msgpack.unpackb(data, unicode_errors="surrogateescape"),
                    descriptors,
                    [link.fileno(), selector.fileno(), *processes],
                )
                for sent in descriptors:
                    os.close(sent)
                if isinstance(forked, str):
                    link.send(msgpack.packb({"error": forked}))
                    continue
                pid, pidfd = forked
                processes[pidfd] = pid
                selector.register(pidfd, selectors.EVENT_READ)
                socket.send_fds(link, [msgpack.packb({"forked": pid})], [pidfd])
    except OSError:
        os._exit(0)  # its maker has ended


def _fork(request: dict[str, Any], descriptors: list[int], own: list[int]) -> tuple[int, int] | str:
    """Process and its descriptor, or why there is none."""
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return str(error)
    if pid == 0:
        _become(request, descriptors, own, server)
    try:
        return pid, os.pidfd_open(pid)
    except OSError as error:  # nothing could end it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return f"pidfd_open: {error}"


def _become(request: dict[str, Any], descriptors: list[int], own: list[int], server: int) -> NoReturn:
    status = 1
    try:
        end_with_parent(server)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _arrange_descriptors(request["descriptors"], descriptors, own)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [request["module"], *request["arguments"]]
        name_process(request["module"].replace("services.", "moemesh-", 1))
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _arrange_descriptors(wanted: list[int], received: list[int], own: list[int]) -> None:
    """What was sent gets the numbers that its sender has it under; the server's own are closed."""
    first_free = max([*wanted, *received, *own, 2]) + 1
    aside = [os.dup2(descriptor, first_free + place) for place, descriptor in enumerate(received)]
    for descriptor in {*received, *own}:
        os.close(descriptor)
    for descriptor, number in zip(aside, wanted, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    main()
