"""What an expert node holds is what the newest assignment wants, whatever was under way when it came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.checkpoint.model_config import read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.errors import CheckpointError, DeadlineError, DeviceError
from common.messages import AssignShards, ShardsReady
from common.node.loader_thread import LoaderThread
from common.topology import ShardId
from common.wire.array import array_to_frame, frame_to_array
from services.expert.shard_loader import RETRY_S, HeldShards, ShardLoader
from services.expert.shard_store import ShardStore
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.listening_router import HELLO, ListeningRouter

__all__ = ["one_torch_thread"]
X, Y = ShardId(1, 3, 0), ShardId(1, 4, 0)


class Loader(ShardLoader):
    """With a clock that is moved by hand, and assignments by shards."""

    def __init__(self, held: HeldShards) -> None:
        self.control = ListeningRouter()
        control: Any = self.control
        log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        self.now_s = 100.0
        super().__init__(held, control, log, lambda: self.now_s)

    def want(self, version: int, *shards: ShardId) -> None:
        shape = (self.held.config.num_layers, self.held.config.num_experts, self.control.settings.num_slices)
        bitmap = np.zeros(shape, np.uint8)
        for shard in shards:
            bitmap[shard] = 2
        self.assign(AssignShards(version, array_to_frame(bitmap)), 0)

    def turn(self) -> None:
        self.poll(self.now_s)

    def begin_loading(self) -> None:
        """Until the loader has shards in hand."""
        self.until(lambda: bool(self._loading))

    def wait_loaded(self) -> None:
        """Until the loader has done what it has in hand; nobody has looked at it yet."""
        if self._opening is not None:
            self._opening.exception(timeout=60)
        for _, future in self._loading:
            future.exception(timeout=60)

    def finish(self) -> ShardsReady:
        """Turn until everything is reported; the report."""
        reports = self.until(lambda: bool(self.reports) and self.reports[-1].complete)
        return reports[-1]

    def until(self, is_over: Callable[[], bool]) -> list[ShardsReady]:
        deadline_s = time.monotonic() + 60
        while not is_over():
            assert time.monotonic() < deadline_s
            self.now_s += 0.05
            self.turn()
            time.sleep(0.001)
        return self.reports

    @property
    def reports(self) -> list[ShardsReady]:
        return [message for message in self.control.sent if isinstance(message, ShardsReady)]

    @property
    def shards(self) -> set[ShardId]:
        return set(self.held.store or ())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


@pytest.fixture
def loader(directory: Path) -> Iterator[Loader]:
    made = Loader(HeldShards(read_model_config(directory), directory))
    yield made
    made.close()


def test_another_incarnation_has_the_shards_of_the_one_before_and_says_so(loader: Loader, directory: Path) -> None:
    loader.want(1, X, Y)
    loader.finish()
    kept = loader.held.store
    assert kept is not None
    before = kept.find(X)
    following = Loader(loader.held)
    following.turn()
    assert following.reports == [], "nothing is let go before the router has said what it wants"
    shape = (loader.held.config.num_layers, loader.held.config.num_experts, kept.num_slices)
    assert int(frame_to_array(following.add_held(HELLO).held_shards, "uint8", shape, "shards").sum()) == 2
    following.want(1, X)
    assert following.finish().version == 1
    assert following.shards == {X}
    assert following.held.store is kept
    assert kept.find(X) is before, "not read again"
    following.close()


def test_a_report_names_no_version_of_a_router_before_this_one(loader: Loader) -> None:
    loader.want(7, X)
    loader.control.router_term += 1
    assert loader.finish().version == 0
    assert loader.shards == {X}


def test_what_an_incarnation_before_was_still_loading_is_dropped_if_nobody_wants_it_now(
    loader: Loader, directory: Path
) -> None:
    loader.want(1, X)
    loader.finish()
    kept = loader.held.store
    assert kept is not None
    following = Loader(loader.held)
    following.want(1, X)
    kept.load(CheckpointWeights(directory, torch.float32), Y)  # ends after the assignment
    following.finish()
    assert following.held.store is kept
    assert following.shards == {X}
    following.close()


def test_what_is_wanted_is_loaded_and_what_is_not_is_dropped(loader: Loader) -> None:
    loader.want(1, X, Y)
    assert loader.finish().version == 1
    assert loader.shards == {X, Y}
    loader.control.sent.clear()
    loader.want(2, Y)
    assert loader.finish().version == 2
    assert loader.shards == {Y}


def test_a_shard_that_was_dropped_and_is_wanted_again_before_its_load_was_looked_at_is_loaded_again(
    loader: Loader,
) -> None:
    loader.want(1, X, Y)
    loader.begin_loading()
    loader.wait_loaded()
    loader.want(2, Y)
    loader.want(3, X, Y)
    report = loader.finish()
    assert report.version == 3
    assert loader.shards == {X, Y}


@pytest.mark.parametrize("changed", [{"num_slices": 2}, {"dtype": "bfloat16"}], ids=str)
def test_what_was_loading_into_a_store_that_was_given_up_is_loaded_into_the_new_one(
    loader: Loader, changed: dict[str, Any]
) -> None:
    loader.want(1, X, Y)
    loader.begin_loading()
    loader.control.settings = replace(loader.control.settings, **changed)
    loader.want(2, X, Y)
    assert loader.finish().version == 2
    assert loader.shards == {X, Y}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read in /proc")
def test_no_file_stays_mapped_once_all_is_loaded_and_more_can_be_loaded(loader: Loader, tmp_path: Path) -> None:
    own = write_checkpoint(tmp_path / "own", QWEN3)
    loader.held = HeldShards(read_model_config(own), own)
    for shards in ({X}, {X, Y}):
        loader.control.sent.clear()
        loader.want(1 + len(loader.shards), *shards)
        loader.finish()
        loader.held.thread.submit(lambda: None).result(60)
        assert str(own) not in Path("/proc/self/maps").read_text()
        assert loader.shards == shards


def test_a_shard_that_could_not_be_loaded_is_tried_again_only_while_it_is_wanted(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(store: ShardStore, weights: Any, shard: ShardId) -> None:
        raise CheckpointError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "load", load)
        loader.want(1, X)
        loader.begin_loading()
        loader.wait_loaded()
    loader.want(2, Y)
    before_s = loader.now_s
    assert loader.finish().version == 2
    assert loader.now_s - before_s < RETRY_S
    assert loader.control.failures == ["the disk is gone"]
    assert loader.shards == {Y}


def test_an_index_that_cannot_be_read_is_read_again_after_a_while(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path, dtype: Any, device: Any) -> CheckpointWeights:
        raise CheckpointError("model.safetensors cannot be read: [Errno 5] Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("services.expert.shard_loader.CheckpointWeights", fail)
        loader.want(1, X)
        loader.until(lambda: bool(loader.control.failures))
    assert not any(report.complete for report in loader.reports)
    failed_s = loader.now_s
    assert loader.finish().version == 1
    assert loader.shards == {X}
    assert loader.now_s - failed_s >= RETRY_S
    assert len(loader.control.failures) == 1


def test_a_load_that_hangs_ends_the_node(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(ShardStore, "load", lambda store, weights, shard: release.wait(timeout=60))
    loader.held.thread = LoaderThread(lambda: loader.now_s, lambda thread: 0.5)
    loader.want(1, X)
    loader.begin_loading()
    with pytest.raises(DeadlineError, match="the disk of the checkpoint hangs"):
        loader.until(lambda: False)
    release.set()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sets(st.sampled_from([X, Y])), st.sampled_from(["turn", "wait"])), max_size=12))
def test_whatever_comes_while_shards_load_a_complete_report_is_true(directory: Path, events: list[Any]) -> None:
    loader = Loader(HeldShards(read_model_config(directory), directory))
    wanted: set[ShardId] = set()
    version = 1
    loader.want(version)
    for event in events:
        if event == "turn":
            loader.turn()
        elif event == "wait":
            loader.wait_loaded()
        else:
            version, wanted = version + 1, event
            loader.want(version, *wanted)
        if loader.reports and loader.reports[-1].complete and loader.reports[-1].version == version:
            assert loader.shards == wanted
    loader.until(lambda: any(report.complete and report.version == version for report in loader.reports))
    assert loader.shards == wanted
    loader.close()


def test_a_shard_that_does_not_fit_the_gpu_is_reported_and_a_lost_gpu_ends_the_process(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        def load(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr(ShardStore, "load", load)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    loader.want(1, X)
    loader.until(lambda: bool(loader.control.failures))
    assert loader.control.failures[0].startswith("the GPU has no room for it, set CAPACITY_BYTES lower: CUDA out of")
    fail(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(DeviceError, match="the GPU has failed"):
        loader.until(lambda: False)
