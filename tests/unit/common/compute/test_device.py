"""What goes to a device and comes back is what was sent, and waits are where they should be."""

from __future__ import annotations

import pytest
import torch

from common.compute.device import HOST, NUM_UPLOADS, Device, StagedDevice
from common.errors import RankLostError
from common.processes.memory import offered_bytes
from tests.support.nodes.simulated_gpu import NeverReached, hidden_waits, num_waits, simulated_gpu

TENSORS = (
    torch.arange(6, dtype=torch.int32).reshape(2, 3),
    torch.linspace(-1, 1, 35).to(torch.bfloat16).reshape(5, 7).T,
    torch.empty(0, 4),
    torch.tensor([True, False]),
)


def test_the_host_copies_nothing() -> None:
    assert HOST.is_host
    assert all(a is b for a, b in zip(HOST.to_host(*HOST.to_device(*TENSORS)), TENSORS, strict=True))


def test_processes_that_share_the_hosts_memory_offer_a_part_of_it() -> None:
    assert Device(4).offered_bytes() <= offered_bytes() // 4 * 1.2


def test_tensors_come_back_as_they_went() -> None:
    device = StagedDevice(torch.device("cpu"))
    there = device.to_device(*TENSORS)
    back = device.to_host(*there)
    for sent, on_device, received in zip(TENSORS, there, back, strict=True):
        assert on_device.shape == received.shape == sent.shape
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)
    assert device.to_device() == ()


def test_what_came_back_stays_when_buffers_are_used_again() -> None:
    device = StagedDevice(torch.device("cpu"))
    first = device.to_host(*device.to_device(torch.full((5,), 1.0)))[0]
    device.to_host(*device.to_device(torch.full((5,), 2.0)))
    assert first.tolist() == [1.0] * 5


def test_buffers_are_not_made_anew_for_each_message() -> None:
    device = StagedDevice(torch.device("cpu"))
    for _ in range(NUM_UPLOADS):
        device.to_host(*device.to_device(torch.ones(100_000)))
    before = [buffer._memory for buffer in (*device._uploads, *device._downloads)]
    for rows in range(1, 50):
        device.to_host(*device.to_device(torch.ones(2_000 * rows)))
    after = [buffer._memory for buffer in (*device._uploads, *device._downloads)]
    assert all(memory is former for memory, former in zip(after, before, strict=True))


def test_uploads_in_a_row_do_not_overwrite_one_another_before_the_device_has_read_them() -> None:
    with simulated_gpu() as device:
        there = [device.to_device(torch.full((3,), float(number)))[0] for number in range(3 * NUM_UPLOADS)]
        assert [float(device.to_host(tensor)[0].sum()) for tensor in there] == [
            3.0 * number for number in range(3 * NUM_UPLOADS)
        ]


def test_a_download_of_several_tensors_is_one_wait() -> None:
    with simulated_gpu() as device:
        there = device.to_device(torch.ones(3), torch.ones(4))
        before = num_waits()
        assert [tensor.sum() for tensor in device.to_host(there[0] * 2, there[1] * 3)] == [6, 12]
        assert num_waits() == before + 1
        assert hidden_waits() == []


def test_the_simulated_gpu_refuses_what_a_real_one_does_and_writes_waits_down() -> None:
    with simulated_gpu() as device:
        (there,) = device.to_device(torch.ones(3))
        assert there.device.type == (there * 2).device.type == "cuda"
        with pytest.raises(AssertionError, match="of the host and of the device"):
            there + torch.ones(3)
        with pytest.raises(AssertionError, match="no bytes"):
            there.numpy()
        assert bool((there > 0).all())
        there[there > 0]
        assert hidden_waits() == ["__bool__", "__getitem__"]


def test_what_is_on_its_way_keeps_its_own_buffer_until_it_is_taken() -> None:
    with simulated_gpu() as device:
        downloads = [device.begin_download(device.to_device(torch.full((3,), float(n)))[0]) for n in range(4)]
        before = num_waits()
        assert not downloads[0].is_ready()
        assert num_waits() == before + 1
        taken = [float(download.take()[0].sum()) for download in reversed(downloads)]
        assert taken == [9.0, 6.0, 3.0, 0.0]


def test_a_buffer_goes_back_once_when_what_came_is_taken_or_given_up() -> None:
    device = StagedDevice(torch.device("cpu"))
    (there,) = device.to_device(torch.ones(3))
    first, second = device.begin_download(there), device.begin_download(there)
    assert len(device._downloads) == 0
    assert first.is_ready()
    assert first.take()[0].tolist() == [1.0] * 3
    first.give_up()
    second.give_up()
    second.give_up()
    assert len(device._downloads) == len(set(map(id, device._downloads))) == 2


def test_whoever_waits_for_a_device_calls_what_was_set_to_look_meanwhile() -> None:
    device = StagedDevice(torch.device("cpu"))
    downloads = [device._new_buffer() for _ in range(2)]
    for buffer in downloads:
        buffer._marker = NeverReached()

    def look(waited_s: float) -> None:
        raise RankLostError(f"after {waited_s:.0f} s")

    device.while_waiting = look
    for buffer in downloads:
        buffer.mark()
        with pytest.raises(RankLostError):
            buffer.wait()


def test_nothing_on_its_way_says_when_the_device_is_as_far() -> None:
    with simulated_gpu() as device:
        device.to_device(torch.ones(3))
        mark = device.begin_download()
        while not mark.is_ready():
            pass
        assert mark.take() == ()


def test_on_the_host_all_is_there() -> None:
    download = HOST.begin_download(*TENSORS)
    assert download.is_ready()
    assert all(a is b for a, b in zip(download.take(), TENSORS, strict=True))
