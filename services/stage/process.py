"""One anonymous stage node, from its settings to its end."""

from __future__ import annotations

import sys

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
    """What outlives an incarnation: settings, kernels, the wish to stop, the weights. K and V do not."""

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
        self._loaded: LoadedLayers | None = None
        self._loader = LoaderThread()
        self._router_term = 0

    def live(self) -> None:
        """One incarnation. Raises MoemeshError, NodeLostError where another one may follow."""
        settings, config = self._settings, self._config
        transport = open_transport(settings, self._log)
        sockets: list[MessageSocket] = []

        def bind_data(pattern: str) -> tuple[str, ...]:
            sockets.append(transport.pull("steps", [pattern]))
            return sockets[0].endpoints

        try:
            node = describe_node(NodeKind.STAGE, settings, self._fingerprint, self._numeric_class, transport, bind_data)
            node.control.router_term = self._router_term
            log = self._log.bind(node=node.control.description.node_id)
            num_positions = min(settings.max_context_tokens or sys.maxsize, config.max_position_embeddings)
            keeper = SlotKeeper(
                config,
                self._checkpoint,
                num_positions,
                self._kernels,
                transport,
                node.ipc_token,
                log,
                self._loaded,
                self._loader,
            )
            self._loaded = None  # the keeper lets the layers go when it gets others
            experts = ExpertClient(ExpertNodes(transport, node.ipc_token, log), log)
            mirror_link = MirrorLink(transport, node.ipc_token, log)
            service = StageService(config, keeper, experts, node.control, sockets[0], mirror_link, log)
            try:
                service.run(self._should_stop)
            finally:
                self._router_term = node.control.router_term
                self._loaded = keeper.loaded
                keeper.close()
        finally:
            transport.close()
