"""One anonymous stage node, from its settings to its end."""

from __future__ import annotations

import sys

import structlog
import torch

from common.compute.native_library import load_native_kernels
from common.config import Settings
from common.node_process import describe_node, open_transport, run_lives
from common.node_resources import NodeResources
from common.numeric_class import numeric_class
from common.topology import NodeKind
from common.transport import MessageSocket
from services.stage.expert_client import ExpertClient
from services.stage.expert_nodes import ExpertNodes
from services.stage.mirror_link import MirrorLink
from services.stage.service import StageService
from services.stage.slot_keeper import LoadedLayers, SlotKeeper


def serve(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Register and serve until told to stop. Raises MoemeshError."""
    stage = StageProcess(settings, log)
    run_lives(stage.live, log)
    log.info("stopped")


class StageProcess:
    """Its layers go from one incarnation to the next. K and V do not."""

    def __init__(self, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
        self._resources = NodeResources(settings, log)
        torch.set_num_threads(settings.threads)
        self._kernels = load_native_kernels(threads=settings.threads)
        self._numeric_class = numeric_class("cpu", self._kernels.variant if self._kernels is not None else "torch")
        self._loaded: LoadedLayers | None = None

    def live(self) -> None:
        """One incarnation. Raises MoemeshError, NodeLostError where another one may follow."""
        own = self._resources
        transport = open_transport(own.settings, own.log)
        sockets: list[MessageSocket] = []

        def bind_data(pattern: str) -> tuple[str, ...]:
            sockets.append(transport.pull("steps", [pattern]))
            return sockets[0].endpoints

        try:
            node = describe_node(NodeKind.STAGE, own.settings, own.seen, self._numeric_class, transport, bind_data)
            node.control.router_term = own.router_term
            log = own.log.bind(node=node.control.description.node_id)
            keeper = SlotKeeper(
                own.config,
                own.checkpoint,
                min(own.settings.max_context_tokens or sys.maxsize, own.config.max_position_embeddings),
                self._kernels,
                transport,
                node.ipc_token,
                log,
                self._loaded,
                own.loader,
            )
            self._loaded = None  # the keeper lets the layers go when it gets others
            experts = ExpertClient(ExpertNodes(transport, node.ipc_token, log), log)
            mirror_link = MirrorLink(transport, node.ipc_token, log)
            service = StageService(own.config, keeper, experts, node.control, sockets[0], mirror_link, log)
            try:
                service.run(own.should_stop)
            finally:
                own.router_term = node.control.router_term
                self._loaded = keeper.loaded
                keeper.close()
        finally:
            transport.close()
