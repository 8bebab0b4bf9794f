"""One anonymous expert node, from its settings to its end."""

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
from common.transport import RoutingSocket
from services.expert.service import ExpertService
from services.expert.shard_keeper import ShardKeeper


def serve(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Register and serve until told to stop. Raises MoemeshError."""
    should_stop = StopFlag()
    torch.set_num_threads(settings.threads)
    checkpoint = resolve_model(settings.model)
    config = read_model_config(checkpoint)
    kernels = load_native_kernels(threads=settings.threads)
    transport = open_transport(settings, log)
    sockets: list[RoutingSocket] = []

    def bind_data(pattern: str) -> tuple[str, ...]:
        sockets.append(transport.router("calls", [pattern]))
        return sockets[0].endpoints

    variant = kernels.variant if kernels is not None else "torch"
    node = describe_node(NodeKind.EXPERT, settings, checkpoint, numeric_class("cpu", variant), transport, bind_data)
    log = log.bind(node=node.control.description.node_id)
    shards = ShardKeeper(config, checkpoint, kernels, node.control, log)
    service = ExpertService(config, shards, node.control, sockets[0], log)
    try:
        service.run(should_stop)
    finally:
        transport.close()
    log.info("stopped")
