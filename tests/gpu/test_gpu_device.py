"""The GPU as a device: pinned buffers, memory that is offered, and what is said where it ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from common.compute.cuda import CudaDevice, open_device
from common.compute.device_errors import raise_if_life_ending, refusal_to_load
from common.errors import CapacityError, ConfigurationError, DeviceError
from services.stage.model.paged_attention import KvShape, allocate_kv_cache
from tests.support.checkpoints.shelf import Shelf
from tests.support.checkpoints.tiny_checkpoints import MIXTRAL_SLIDING_TIED, QWEN3, QWEN3_DENSE_LAYERS, Recipe
from tests.support.nodes.local_pipeline import Chunk, LocalPipeline

pytestmark = pytest.mark.gpu
TOKENS = tuple((7 * position * position + 3 * position + 11) % 200 for position in range(70))


def test_tensors_come_back_as_they_went_by_pinned_memory(gpu: CudaDevice) -> None:
    tensors = [torch.randn(1000, 7), torch.arange(5), torch.randn(33, 8).to(torch.bfloat16).T, torch.empty(0, 3)]
    for _ in range(20):
        there = gpu.to_device(*tensors)
        assert all(tensor.device == gpu.place for tensor in there)
        assert all(torch.equal(*pair) for pair in zip(gpu.to_host(*there), tensors, strict=True))
    assert all(buffer._memory is not None and buffer._memory.is_pinned() for buffer in gpu._uploads)


def test_uploads_in_a_row_arrive_whole(gpu: CudaDevice) -> None:
    there = [gpu.to_device(torch.full((1 << 20,), float(number)))[0] for number in range(40)]
    assert [float(gpu.to_host(tensor.min())[0]) for tensor in there] == list(map(float, range(40)))


def test_a_part_of_the_gpus_memory_is_offered(gpu: CudaDevice) -> None:
    total_bytes = torch.cuda.mem_get_info(gpu.place)[1]
    assert 0 < gpu.offered_bytes() <= 0.8 * total_bytes
    assert CudaDevice(gpu.place, 4).offered_bytes() <= 0.2 * total_bytes


def test_its_class_names_the_gpu(gpu: CudaDevice) -> None:
    word = gpu.numeric_class("torch")
    assert word.startswith("cuda/torch/")
    assert torch.cuda.get_device_name(gpu.place).replace(" ", "-") in word


def test_a_gpu_beyond_the_last_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"DEVICE=cuda:99 cannot be used: "):
        open_device("cuda:99")


def test_want_of_memory_is_a_sentence(gpu: CudaDevice) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        allocate_kv_cache(KvShape(1, 1 << 30, 64, 128, torch.float32), partial(torch.zeros, device=gpu.place))
    assert isinstance(refusal_to_load(caught.value), CapacityError)
    with pytest.raises(DeviceError, match="the GPU has no memory left for this step: CUDA out of memory"):
        raise_if_life_ending(caught.value)


@pytest.mark.parametrize("recipe", [QWEN3, MIXTRAL_SLIDING_TIED, QWEN3_DENSE_LAYERS], ids=lambda recipe: recipe.name)
def test_chunks_stages_nodes_and_batch_mates_change_no_bit(gpu: CudaDevice, shelf: Shelf, recipe: Recipe) -> None:
    directory: Path = shelf.checkpoint(recipe)
    expected = LocalPipeline(directory).logits([Chunk(1, TOKENS)])
    whole = LocalPipeline(directory, device=gpu).logits([Chunk(1, TOKENS)])
    assert (whole - expected).abs().max() < 1e-4
    pipeline, others = LocalPipeline(directory, pp=2, num_nodes=2, device=gpu), TOKENS[::-1]
    rows = [
        pipeline.logits([Chunk(8, others[:5]), Chunk(1, TOKENS[:33])])[5:],
        pipeline.logits([Chunk(1, TOKENS[33:34]), Chunk(9, others)])[:1],
        pipeline.logits([Chunk(8, others[5:6]), Chunk(1, TOKENS[34:69]), Chunk(9, others[:1])])[1:-1],
        pipeline.logits([Chunk(1, TOKENS[69:])]),
    ]
    assert torch.equal(torch.cat(rows), whole)
