"""One anonymous expert node, from its settings to its end."""

from __future__ import annotations

import structlog
import torch

from common.checkpoint import fingerprint, resolve_model
from common.compute.native_library import load_native_kernels
from common.config import Settings
from common.loader_thread import LoaderThread
from common.memory import offered_bytes
from common.model_config import read_model_config
from common.node_process import StopFlag, describe_node, open_transport, run_lives
from common.numeric_class import numeric_class
from common.topology import NodeKind
from common.transport import RoutingSocket
from services.expert.service import ExpertService
from services.expert.shard_keeper import HeldShards, ShardKeeper


def serve(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Register and serve until told to stop. Raises MoemeshError."""
    expert = ExpertProcess(settings, log)
    run_lives(expert.live, log)
    log.info("stopped")


class ExpertProcess:
    """What outlives an incarnation: settings, kernels, the wish to stop, the shards."""

    def __init__(self, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
        self._should_stop = StopFlag()
        torch.set_num_threads(settings.threads)
        # Once: what an incarnation holds does not make the next one smaller.
        self._settings = settings.model_copy(update={"capacity_bytes": settings.capacity_bytes or offered_bytes()})
        self._log = log
        self._checkpoint = resolve_model(settings.model)
        self._config = read_model_config(self._checkpoint)
        self._fingerprint = fingerprint(self._checkpoint)
        self._kernels = load_native_kernels(threads=settings.threads)
        variant = self._kernels.variant if self._kernels is not None else "torch"
        self._numeric_class = numeric_class("cpu", variant)
        self._held: HeldShards | None = None
        self._loader = LoaderThread()
        self._router_term = 0

    def live(self) -> None:
        """One incarnation. Raises MoemeshError, NodeLostError where another one may follow."""
        transport = open_transport(self._settings, self._log)
        sockets: list[RoutingSocket] = []

        def bind_data(pattern: str) -> tuple[str, ...]:
            sockets.append(transport.router("calls", [pattern]))
            return sockets[0].endpoints

        try:
            node = describe_node(
                NodeKind.EXPERT, self._settings, self._fingerprint, self._numeric_class, transport, bind_data
            )
            node.control.router_term = self._router_term
            log = self._log.bind(node=node.control.description.node_id)
            shards = ShardKeeper(
                self._config, self._checkpoint, self._kernels, node.control, log, held=self._held, loader=self._loader
            )
            self._held = None  # the keeper lets shards go that are not wanted any more
            service = ExpertService(self._config, shards, node.control, sockets[0], log)
            try:
                service.run(self._should_stop)
            finally:
                self._router_term = node.control.router_term
                self._held = shards.hand_over()
                shards.close()
        finally:
            transport.close()
