"""One anonymous stage node, from its settings to its end."""

from __future__ import annotations

import structlog
import torch

from common.checkpoint import resolve_model
from common.compute.native_library import load_native_kernels
from common.config import Settings
from common.model_config import read_model_config
from common.node_process import StopFlag, describe_node, open_transport
from common.numeric_class import numeric_class
from common.topology import NodeKind
from common.transport import MessageSocket
from services.stage.expert_client import ExpertClient
from services.stage.expert_nodes import ExpertNodes
from services.stage.mirror_link import MirrorLink
from services.stage.service import StageService
from services.stage.slot_keeper import SlotKeeper


def serve(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Register and serve until told to stop. Raises MoemeshError."""
    should_stop = StopFlag()
    torch.set_num_threads(settings.threads)
    checkpoint = resolve_model(settings.model)
    config = read_model_config(checkpoint)
    kernels = load_native_kernels(threads=settings.threads)
    transport = open_transport(settings, log)
    sockets: list[MessageSocket] = []

    def bind_data(pattern: str) -> tuple[str, ...]:
        sockets.append(transport.pull("steps", [pattern]))
        return sockets[0].endpoints

    variant = kernels.variant if kernels is not None else "torch"
    node = describe_node(NodeKind.STAGE, settings, checkpoint, numeric_class("cpu", variant), transport, bind_data)
    log = log.bind(node=node.control.description.node_id)
    num_positions = min(settings.max_context_tokens or config.max_position_embeddings, config.max_position_embeddings)
    keeper = SlotKeeper(config, checkpoint, num_positions, kernels, transport, node.ipc_token, log)
    experts = ExpertClient(ExpertNodes(transport, node.ipc_token, log), log)
    mirror_link = MirrorLink(transport, node.ipc_token, log)
    service = StageService(config, keeper, experts, node.control, sockets[0], mirror_link, log)
    try:
        service.run(should_stop)
    finally:
        transport.close()
    log.info("stopped")
