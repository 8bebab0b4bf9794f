"""How the process of a rank is started, and what it does: `services.stage.ranks`, forked for rank 0 and no other."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog
import torch

from common.checkpoint.model_config import ModelConfig, read_model_config
from common.compute.cuda import open_device
from common.compute.device import Device
from common.compute.native_library import NativeKernels, load_native_kernels
from common.errors import ConfigurationError
from common.processes.child_process import ChildProcess
from common.processes.fork_server import ForkServer
from services.stage.model.tp_shard import check_degree
from services.stage.ranks.group import SLAB_BYTES, GroupSettings, RankGroup
from services.stage.ranks.memory_needs import num_memories
from services.stage.ranks.shared_channel import RankBoard
from services.stage.ranks.shared_memory import SharedMemory
from services.stage.ranks.supervisor import RankStaff
from services.stage.ranks.worker import Follower


def fork_server_of_ranks() -> ForkServer:
    """A fork of this process, which must have one thread: ranks begin with what it has imported, torch above all."""
    forks = ForkServer(["services.stage.ranks.processes"], os.environ)
    forks.fork_off()
    return forks


def open_group(
    settings: GroupSettings,
    config: ModelConfig,
    checkpoint: Path,
    num_positions: int,
    threads: int,
    capacity_bytes: int,
    kernels: NativeKernels | None,
    forks: ForkServer,
    log: structlog.stdlib.BoundLogger,
    device: Device,
    places: Sequence[str],
) -> RankGroup:
    """Start the ranks of this process's stage. Raises ConfigurationError for a degree that cannot be.

    `capacity_bytes`: what the router is told; `kernels`, `device`: rank 0's; `places`: where each rank computes, as
    DEVICE says it.
    """
    check_degree(config, settings.degree)
    board_kernels = kernels or load_native_kernels(threads=threads)
    if board_kernels is None:
        raise ConfigurationError(
            f"TP={settings.degree} needs the native kernels, by which ranks wait for each other: install a C++ compiler"
        )
    memory = SharedMemory.create(RankBoard.num_bytes(SLAB_BYTES), "moemesh-ranks")
    board = RankBoard(memory, SLAB_BYTES, board_kernels)
    common = {
        "board": memory.descriptor,
        "bytes": memory.num_bytes,
        "checkpoint": checkpoint,
        "positions": num_positions,
        "threads": threads,
        "collectives": settings.collectives,
    }
    staff = RankStaff(settings.degree - 1, _spawner(memory, common, places, forks), log)
    staff.start()
    return RankGroup(
        settings,
        config,
        board,
        staff,
        log,
        kernels=kernels,
        device=device,
        capacity_bytes=0 if device.is_host else capacity_bytes // num_memories(settings.degree, config.num_kv_heads),
    )


def _spawner(
    memory: SharedMemory, common: Mapping[str, object], places: Sequence[str], forks: ForkServer
) -> Callable[[int], ChildProcess]:
    def spawn(seat: int) -> ChildProcess:
        arguments = {**common, "seat": seat, "device": places[seat]}
        options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        return forks.spawn("services.stage.ranks", options, os.environ, {memory.descriptor: memory.descriptor})

    return spawn


def serve_rank(log: structlog.stdlib.BoundLogger) -> None:
    """The work of a rank, until rank 0 ends. Raises MoemeshError."""
    parser = argparse.ArgumentParser(prog="python -m services.stage.ranks")
    for name in ("seat", "board", "bytes", "positions", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    for name in ("device", "collectives"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 hears it too, and ends in order
    torch.set_num_threads(options.threads)
    kernels = load_native_kernels(threads=options.threads)
    if kernels is None:
        raise ConfigurationError("a rank needs the native kernels that rank 0 has")
    memory = SharedMemory(options.board, options.bytes)
    board = RankBoard(memory, SLAB_BYTES, kernels)
    config = read_model_config(options.checkpoint)
    device = open_device(options.device)
    follower = Follower(
        board,
        options.seat,
        config,
        options.checkpoint,
        options.positions,
        kernels if device.is_host else None,
        log,
        device,
        options.collectives,
    )
    follower.join(os.getpid())
    follower.run()
