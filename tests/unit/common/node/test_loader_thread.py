"""The loader's thread: one thing after another, and nothing that hangs in it holds up anything else."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from common.errors import DeadlineError
from common.node.loader_thread import MAX_LOOK_S, STUCK_S, LoaderThread, thread_cpu_seconds

WAIT_S = 60.0


@pytest.fixture
def loader() -> Iterator[LoaderThread]:
    made = LoaderThread()
    yield made
    made.close()


def test_work_is_done_in_order_in_one_thread_and_its_errors_go_to_who_asked(loader: LoaderThread) -> None:
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        if number == 3:
            raise ValueError("three")
        return threading.get_ident()

    futures = [loader.submit(work, number) for number in range(6)]
    assert isinstance(futures[3].exception(timeout=WAIT_S), ValueError)
    assert len({future.result(timeout=WAIT_S) for future in futures if future is not futures[3]}) == 1
    assert done == [0, 1, 2, 3, 4, 5]


def test_closing_gives_up_what_has_not_begun_and_waits_for_nothing(loader: LoaderThread) -> None:
    begun, hung = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        hung.wait(timeout=WAIT_S)

    first, second = loader.submit(hang), loader.submit(int)
    assert begun.wait(timeout=WAIT_S)
    loader.close()
    assert second.cancelled()
    assert not first.done()
    hung.set()
    first.result(timeout=WAIT_S)


def test_what_was_loaded_and_nobody_wants_any_more_takes_no_memory(loader: LoaderThread) -> None:
    class Weights:
        """Gigabytes of them."""

    future = loader.submit(Weights)
    seen = weakref.ref(future.result(timeout=WAIT_S))
    del future
    loader.submit(int).result(timeout=WAIT_S)
    loader.submit(int).result(timeout=WAIT_S)
    loader.check()
    gc.collect()
    assert seen() is None


class Watched:
    """A loader whose clocks are moved by hand: the wall's, and its thread's CPU time."""

    def __init__(self) -> None:
        self.now_s, self.cpu_s = 100.0, 0.5
        self.release = threading.Event()
        self.loader = LoaderThread(lambda: self.now_s, lambda thread: self.cpu_s)

    def hang(self) -> None:
        self.loader.submit(self.release.wait, WAIT_S)

    def look(self, after_s: float) -> None:
        self.now_s += after_s
        self.loader.check()

    def look_for(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.look(0.5)


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.release.set()
    made.loader.close()


def test_a_load_that_gets_no_cpu_time_is_stuck(watched: Watched) -> None:
    watched.hang()
    watched.look_for(STUCK_S - 1)
    with pytest.raises(DeadlineError, match="the disk of the checkpoint hangs"):
        watched.look_for(2)


def test_a_load_that_takes_long_is_not_stuck_while_it_does_anything(watched: Watched) -> None:
    watched.hang()
    for _ in range(10):
        watched.look_for(STUCK_S - 1)
        watched.cpu_s += 1e-6
        watched.look(0.5)


def test_a_thread_without_work_is_not_stuck(watched: Watched) -> None:
    watched.look_for(2 * STUCK_S)
    watched.loader.submit(int).result(timeout=WAIT_S)
    watched.look_for(2 * STUCK_S)
    watched.hang()
    watched.look_for(STUCK_S - 1)


def test_a_process_that_stood_still_as_a_whole_has_not_seen_a_hang(watched: Watched) -> None:
    watched.hang()
    watched.look(0.5)
    watched.look(10 * STUCK_S)
    watched.look_for(STUCK_S - 2 * MAX_LOOK_S)


def test_where_the_system_tells_no_cpu_time_nothing_is_stuck(watched: Watched) -> None:
    loader = LoaderThread(lambda: watched.now_s, lambda thread: None)
    loader.submit(watched.release.wait, WAIT_S)
    for _ in range(100):
        watched.now_s += 1.0
        loader.check()
    loader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the CPU time of another thread")
def test_a_read_that_hangs_is_told_from_one_that_is_slow(
    loader: LoaderThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.node.loader_thread.STUCK_S", 1.5)
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)

    def look_until_done(future: Future[bytes]) -> None:
        while not future.done():
            time.sleep(0.02)
            loader.check()

    read = loader.submit(pipe.read_bytes)
    with pipe.open("wb", buffering=0) as disk:
        for _ in range(10):
            disk.write(b"bytes")
            time.sleep(0.1)
            loader.check()
    look_until_done(read)
    assert len(read.result()) == 50
    hung = loader.submit(pipe.read_bytes)
    with pytest.raises(DeadlineError):
        look_until_done(hung)
    pipe.open("wb").close()
    assert hung.result(timeout=WAIT_S) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the CPU time of another thread")
def test_cpu_time_grows_with_the_smallest_work_and_not_while_a_thread_waits() -> None:
    go, stop = threading.Semaphore(0), threading.Event()
    worked = threading.Event()

    def work() -> None:
        while not stop.is_set():
            go.acquire(timeout=WAIT_S)
            worked.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    seen: list[float | None] = []
    for _ in range(3):
        worked.clear()
        go.release()
        assert worked.wait(timeout=WAIT_S)
        time.sleep(0.2)  # it waits again by now
        seen.append(thread_cpu_seconds(thread))
        time.sleep(0.2)
        assert thread_cpu_seconds(thread) == seen[-1]
    assert None not in seen
    assert len(set(seen)) == 3
    stop.set()
    go.release()
    thread.join(timeout=WAIT_S)
