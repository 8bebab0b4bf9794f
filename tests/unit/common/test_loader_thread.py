"""The loader's thread: one thing after another, and nothing that hangs in it holds up anything else."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from common.loader_thread import LoaderThread

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
    gc.collect()
    assert seen() is None
