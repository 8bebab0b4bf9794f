"""One anonymous stage node, from its settings to its end."""

from __future__ import annotations

import sys

import structlog
import torch

from common.checkpoint.model_config import ModelConfig
from common.compute.cuda import count_gpus, open_device, places_of_ranks
from common.compute.device_errors import raise_if_life_ending
from common.compute.native_library import load_native_kernels
from common.config import Settings
from common.errors import ConfigurationError
from common.node.process import NodeProcess, NodeResources, open_node, run_lives
from common.processes.cores import compute_threads
from common.processes.fork_server import ForkServer
from common.topology import NodeKind
from common.wire.transport import MessageSocket
from common.wire.zmq_functions import zmq_functions
from services.stage.experts.client import ExpertClient
from services.stage.experts.nodes import ExpertNodes
from services.stage.experts.rings import Rings
from services.stage.ranks.collectives import CollectivesKind, choose_collectives
from services.stage.ranks.group import RankGroup, fork_server_of_ranks, open_group
from services.stage.ranks.memory_needs import num_memories
from services.stage.service import StageService
from services.stage.slot.layers import StageLayers
from services.stage.slot.stage_worker import StageWorker


def serve(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Registers and serves until told to stop. Raises MoemeshError."""
    forks = fork_server_of_ranks() if settings.tp > 1 else None  # before there are threads and sockets
    stage = StageProcess(settings, forks, log)
    try:
        run_lives(stage.live, log)
    finally:
        if stage.ranks is not None:
            stage.ranks.supervisor.end()
        if forks is not None:
            forks.close()
    log.info("stopped")


class StageProcess:
    """Its layers go from one incarnation to the next. K and V do not."""

    def __init__(self, settings: Settings, forks: ForkServer | None, log: structlog.stdlib.BoundLogger) -> None:
        """`forks`: of ranks, where there are others than this process."""
        self._device = open_device(settings.device, num_ranks=settings.tp, num_processes=settings.device_processes)
        self._resources = NodeResources(settings, log, lambda config: self._offered_bytes(config, settings.tp))
        torch.set_num_threads(settings.library_threads)
        # Tokens are chosen on the host, wherever the layers are.
        self._sampling_kernels = load_native_kernels(threads=compute_threads(settings.threads))
        self._kernels = self._sampling_kernels if self._device.is_host else None
        self._collectives = self._choose_collectives(settings)
        self._numeric_class = self._device.numeric_class(self._variant(settings))
        own = self._resources
        num_positions = min(settings.max_context_tokens or sys.maxsize, own.config.context_tokens)
        self.ranks = None if forks is None else self._open_ranks(num_positions, forks)
        self._layers = StageLayers(
            own.config, own.checkpoint, num_positions, self._kernels, self._device, self.ranks, own.loader
        )

    def _variant(self, settings: Settings) -> str:
        """Returns what decides the bits besides the device itself: kernels, and how ranks share the work."""
        variant = self._kernels.variant if self._kernels is not None else "torch"
        if settings.tp > 1 and settings.tp_reduce == "fast":
            # Partial sums have other bits, and each kind of collectives has its own order and rounding of them.
            return f"{variant}+fast{settings.tp}{self._collectives}"
        if settings.tp > 1 and not self._device.is_host:
            return f"{variant}+parts{settings.tp}"  # a device's bits depend on the shapes of products
        return variant

    def _open_ranks(self, num_positions: int, forks: ForkServer) -> RankGroup:
        places = places_of_ranks(self._device.place, self._resources.settings.tp, self._num_gpus)
        return open_group(self._resources, num_positions, self._collectives, self._kernels, self._device, forks, places)

    def _offered_bytes(self, config: ModelConfig, num_ranks: int) -> int:
        """Returns what all ranks have together."""
        times = 1 if self._device.is_host else num_memories(num_ranks, config.num_kv_heads)
        return self._device.offered_bytes() * times

    @property
    def _num_gpus(self) -> int:
        return 0 if self._device.is_host else count_gpus()

    def _choose_collectives(self, settings: Settings) -> CollectivesKind:
        """Returns how ranks exchange parts. Raises ConfigurationError for NCCL where it cannot be."""
        have_own_gpus = self._num_gpus >= settings.tp
        if settings.tp_collectives == "nccl" and settings.tp > 1 and not have_own_gpus:
            raise ConfigurationError(
                f"TP_COLLECTIVES=nccl needs a GPU for each of TP={settings.tp} ranks, torch sees {self._num_gpus} "
                f"from DEVICE={settings.device}; TP_COLLECTIVES=board lets ranks share one"
            )
        return choose_collectives(settings.tp_collectives, is_on_host=self._device.is_host, have_own_gpus=have_own_gpus)

    def live(self) -> None:
        """Lives through one incarnation. Raises MoemeshError, NodeLostError where another one may follow."""
        own = self._resources
        if self.ranks is not None:
            self.ranks.reform(own.should_stop)
            if (loaded := self._layers.loaded) is not None and loaded.ranks_load != self.ranks.in_use:
                self._layers.loaded = None  # cut for other ranks
        with open_node(
            NodeKind.STAGE, own, self._numeric_class, lambda transport, address: transport.pull("steps", [address])
        ) as node:
            worker = StageWorker(self._layers, node.transport, node.ipc_token, node.log, self._sampling_kernels)
            nodes = ExpertNodes(node.transport, node.ipc_token, own.config.num_experts, node.log)
            experts = ExpertClient(nodes, node.log, self._rings(nodes, node), self._sampling_kernels)
            try:
                StageService(node, worker, experts).run(own.should_stop)
            except RuntimeError as error:
                raise_if_life_ending(error)
                raise
            finally:
                experts.close()
                worker.close()

    def _rings(self, nodes: ExpertNodes, node: NodeProcess[MessageSocket]) -> Rings | None:
        """Returns what makes calls from native code; None where all calls go as messages."""
        settings, functions = self._resources.settings, zmq_functions()
        if self._kernels is None or settings.call_rings == "off" or (node.rings_folder is None and functions is None):
            return None
        width = self._resources.config.hidden_size
        try:
            return Rings(nodes, node.rings_folder, functions, self._kernels, width, node.log)
        except OSError as error:
            node.log.warning("no_rings", folder=str(node.rings_folder), reason=str(error))
            return None
