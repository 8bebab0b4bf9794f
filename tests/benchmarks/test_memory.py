"""What the memory benchmark reads, and its bound."""

from __future__ import annotations

from pathlib import Path

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.benchmarks.memory import ModelBytes, bound_bytes, cache_bytes, read_memory, weights_of

ROLLUP = """\
5581a000-7ffe1000 ---p 00000000 00:00 0                                  [rollup]
Rss:                9000 kB
Pss:                3000 kB
Pss_Anon:           1500 kB
Pss_File:           1400 kB
Pss_Shmem:           100 kB
"""


def test_a_process_has_the_sizes_of_its_rollup(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/smaps_rollup").write_text(ROLLUP)
    found = read_memory("stage-0", 7, tmp_path)
    assert (found.pss, found.anonymous, found.mapped, found.shared) == (3000 << 10, 1500 << 10, 1400 << 10, 100 << 10)


def test_all_weights_of_a_checkpoint_are_of_stages_or_of_experts(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    weights = weights_of(folder)
    assert weights.stages > 0
    assert weights.experts > 0
    size = (folder / "model.safetensors").stat().st_size
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert weights.stages + weights.experts == size - 8 - header


def test_the_last_slot_of_a_stage_counts() -> None:
    assert cache_bytes('{"kv_bytes": 5}\n{"event": "x"}\n{"kv_bytes": 7}\n') == 7
    assert cache_bytes("") == 0


def test_each_copy_of_the_experts_counts() -> None:
    assert bound_bytes(ModelBytes(100, 1000), 2, caches=7, shared=3, num_processes=1) == 2520 + 10 + 150_000_000
