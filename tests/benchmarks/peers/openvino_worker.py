"""Runs in OpenVINO's environment, where nothing of this project is installed: answers rounds on stdin until it closes.

    python openvino_worker.py FOLDER THREADS

A line in, {"prompts": [[ids]], "max_tokens": n}, gives a line out, {"sent_s": s, "arrivals": [[[s, count]]]}.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

CACHE_GIB = 4
MAX_BATCHED_TOKENS = 2048
MAX_SEQUENCES = 64


def main(folder: str, threads: str) -> None:
    """Says `ready` first."""
    numpy: Any = importlib.import_module("numpy")
    openvino: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = CACHE_GIB
    scheduling.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduling.max_num_seqs = MAX_SEQUENCES
    scheduling.enable_prefix_caching = False
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        "INFERENCE_NUM_THREADS": int(threads),
    }
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", properties)
    print("ready", flush=True)
    number = 0
    for line in sys.stdin:
        order = json.loads(line)
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = order["max_tokens"]
        config.ignore_eos = config.do_sample = True
        config.temperature, config.top_p = 1.0, 1.0
        sent_s, handles = time.perf_counter(), []
        for prompt in order["prompts"]:
            number += 1
            config.rng_seed = number
            ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
            handles.append(pipeline.add_request(number, ids, config))
        arrivals: list[list[tuple[float, int]]] = [[] for _ in handles]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now_s = time.perf_counter()
            for handle, stream in zip(handles, arrivals, strict=True):
                while handle.can_read():
                    stream.append((now_s, sum(len(output.generated_ids) for output in handle.read().values())))
        print(json.dumps({"sent_s": sent_s, "arrivals": arrivals}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
