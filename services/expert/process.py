"""One anonymous expert node, from its settings to its end."""

from __future__ import annotations

import structlog
import torch

from common.compute.cuda import open_device
from common.compute.device_errors import raise_if_life_ending
from common.compute.native_library import load_native_kernels
from common.config import Settings
from common.node.process import NodeProcess, NodeResources, open_node, run_lives
from common.processes.cores import compute_threads
from common.topology import NodeKind
from common.wire.transport import RoutingSocket
from common.wire.zmq_functions import zmq_functions
from services.expert.ring_server import LinkSocket, RingServer
from services.expert.service import ExpertService
from services.expert.shard_loader import HeldShards, ShardLoader


def serve(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Registers and serves until told to stop. Raises MoemeshError."""
    expert = ExpertProcess(settings, log)
    run_lives(expert.live, log)
    log.info("stopped")


class ExpertProcess:
    """Its shards go from one incarnation to the next."""

    def __init__(self, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
        self._device = open_device(settings.device, num_processes=settings.device_processes)
        self._resources = NodeResources(settings, log, lambda config: self._device.offered_bytes())
        torch.set_num_threads(settings.library_threads)
        kernels = load_native_kernels(threads=compute_threads(settings.threads)) if self._device.is_host else None
        self._numeric_class = self._device.numeric_class(kernels.variant if kernels is not None else "torch")
        self._zmq = zmq_functions()
        own = self._resources
        self._held = HeldShards(own.config, own.checkpoint, kernels, self._device, own.loader)

    def live(self) -> None:
        """Lives through one incarnation. Raises MoemeshError, NodeLostError where another one may follow."""
        own = self._resources
        with open_node(
            NodeKind.EXPERT,
            own,
            self._numeric_class,
            lambda transport, address: transport.router("calls", [address]),
            has_links=self._held.kernels is not None and self._zmq is not None,
        ) as node:
            shards = ShardLoader(self._held, node.control, node.log)
            rings = self._open_rings(node)
            try:
                ExpertService(node, shards, rings=rings).run(own.should_stop)
            except RuntimeError as error:
                raise_if_life_ending(error)
                raise
            finally:
                if rings is not None:
                    rings.close()
                shards.close()

    def _open_rings(self, node: NodeProcess[RoutingSocket]) -> RingServer | None:
        """Returns what takes calls in native code; None where it cannot be: all come as messages then."""
        folder, hello, kernels = node.rings_folder, node.control.hello, self._held.kernels
        links = None if node.links is None or self._zmq is None else LinkSocket(node.links, self._zmq)
        if kernels is None or (folder is None and links is None):
            return None
        return RingServer(folder, hello.node_id, hello.incarnation, kernels, node.log, links=links)
