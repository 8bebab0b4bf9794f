"""A checkpoint is made once, and again when its sizes have changed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.make_bench_model import SIZES, make_bench_model


def test_one_with_this_config_is_left_and_one_with_another_is_made_anew(tmp_path: Path) -> None:
    directory = make_bench_model(tmp_path / "model", "small")
    config, weights = directory / "config.json", directory / "model.safetensors"
    made_ns = weights.stat().st_mtime_ns
    make_bench_model(directory, "small")
    assert weights.stat().st_mtime_ns == made_ns
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    make_bench_model(directory, "small")
    assert weights.stat().st_mtime_ns > made_ns
    assert json.loads(config.read_text())["max_position_embeddings"] == SIZES["small"].context_tokens == 32_768
