"""A log that nobody takes stops nobody."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import structlog

from common.log import MAX_LINES, LogStream, configure_log, unbuffered


def test_lines_come_whole_and_in_order() -> None:
    file = io.StringIO()
    stream = LogStream(file.write)
    for number in range(1000):
        stream.write(f"{number}\n")
    assert stream.drain(5)
    assert file.getvalue() == "".join(f"{number}\n" for number in range(1000))


def test_who_logs_does_not_wait_for_a_disk_that_hangs_and_what_was_dropped_is_counted() -> None:
    answers, written = threading.Event(), list[str]()

    def hangs(text: str) -> None:
        answers.wait(20)
        written.append(text)

    stream = LogStream(hangs)
    began_s = time.monotonic()
    for number in range(2 * MAX_LINES):
        stream.write(f"{number}\n")
    assert not stream.drain(0.05)
    assert time.monotonic() - began_s < 5
    answers.set()
    assert stream.drain(5)
    stream.write("back\n")
    assert stream.drain(5)
    lines = "".join(written).splitlines()
    assert lines[: MAX_LINES - 1] == [str(number) for number in range(MAX_LINES - 1)]
    assert "back" in lines
    dropped = [json.loads(line) for line in lines if line.startswith("{")]
    assert sum(each["number"] for each in dropped) + len(lines) - len(dropped) == 2 * MAX_LINES + 1


def test_a_log_that_cannot_be_written_ends_nobody() -> None:
    def full(text: str) -> None:
        raise OSError("full")

    stream = LogStream(full)
    stream.write("a\n")
    assert stream.drain(5)


def test_it_has_no_thread_before_the_first_line_so_that_a_process_may_fork_and_its_fork_logs_too() -> None:
    reader, writer = os.pipe()
    num_threads = threading.active_count()
    stream = LogStream(lambda text: os.write(writer, text.encode()))
    assert threading.active_count() == num_threads
    stream.write("parent\n")
    assert stream.drain(5)
    child = os.fork()
    if child == 0:
        stream.write("child\n")
        os._exit(0 if stream.drain(5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == "parent\nchild\n"


def test_where_no_thread_can_be_had_lines_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    file = io.StringIO()
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        stream = LogStream(file.write)
        stream.write("early\n")
    stream.write("late\n")
    assert stream.drain(5)
    assert file.getvalue() == "early\nlate\n"


def test_events_go_through_it() -> None:
    file = io.StringIO()
    stream = LogStream(file.write)
    try:
        configure_log("router", "info", stream).info("starts", port=1)
        assert stream.drain(5)
    finally:
        structlog.reset_defaults()
    assert json.loads(file.getvalue())["event"] == "starts"


def test_it_writes_past_the_buffer_of_a_real_file() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        unbuffered(file)("hé\n")
        assert os.read(reader, 100) == "hé\n".encode()
    os.close(reader)


ENDS = """
import sys, time
from common.node.process import end_process, run_process
def work(log):
    for number in range(200):
        log.info("x" * 1000)
    print("worked", flush=True)
end_process(run_process("router", "info", work))
"""


def test_a_process_whose_log_nobody_reads_works_on_and_ends() -> None:
    """A pipe that is full hangs as a disk does."""
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", ENDS], stderr=writer, stdout=subprocess.PIPE, text=True)
    os.close(writer)
    try:
        said, _ = process.communicate(timeout=30)
        assert (said, process.returncode) == ("worked\n", 0)
    finally:
        process.kill()
        os.close(reader)
