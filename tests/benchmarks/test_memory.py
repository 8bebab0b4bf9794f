"""What the memory benchmark reads, and its bound."""

from __future__ import annotations

import json
from pathlib import Path

from compose.tiny_checkpoint import write_tiny_checkpoint
from tests.benchmarks.memory import ModelBytes, bound_bytes, cache_bytes, num_rings, read_memory, ring_bytes, weights_of

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


def test_a_ring_that_is_opened_again_counts_once() -> None:
    lines = [f'{{"node": "expert-{number}", "event": "ring_open"}}' for number in (0, 1, 0)]
    assert num_rings("\n".join([*lines, '{"node": "expert-2", "event": "no_ring"}'])) == 2
    assert num_rings("") == 0


def test_a_ring_has_four_slots_of_a_chunk_each_and_more_with_wider_values_and_slices(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    width, choices = config["hidden_size"], config["num_experts_per_tok"]
    for settings, value_bytes, pairs in (
        ({"DTYPE": "float32"}, 4, choices),
        ({"DTYPE": "bfloat16"}, 2, choices),
        ({"DTYPE": "float32", "EXPERT_SLICES": "2"}, 4, 2 * choices),
    ):
        least = 4 * 256 * ((1 + pairs) * width * value_bytes + 8 * pairs)
        assert least < ring_bytes(folder, settings) <= least + 4 * (128 + 3 * 64)


def test_each_copy_of_the_experts_counts() -> None:
    assert bound_bytes(ModelBytes(100, 1000), 2, caches=7, rings=3, num_processes=1) == 2520 + 10 + 150_000_000
