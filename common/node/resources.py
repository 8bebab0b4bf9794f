"""What outlives an incarnation of a stage or expert node: what does not change, and the wish to stop."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.checkpoint.directory import resolve_model
from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.part import see_checkpoint
from common.config import Settings
from common.node.loader_thread import LoaderThread
from common.node.process import StopFlag
from common.processes.memory import offered_bytes


class NodeResources:
    """Made once a process, without torch. Kernels and weights are the node's own to keep."""

    def __init__(
        self,
        settings: Settings,
        log: structlog.stdlib.BoundLogger,
        free_bytes: Callable[[ModelConfig], int] = lambda config: offered_bytes(),
    ) -> None:
        """`free_bytes`: what the node may offer where no setting says it. Raises MoemeshError for a model that cannot
        be served."""
        self.should_stop = StopFlag()
        self.log = log
        self.checkpoint = resolve_model(settings.model)
        self.config = read_model_config(self.checkpoint)
        # Once: what an incarnation holds does not make the next one smaller.
        capacity_bytes = settings.capacity_bytes or free_bytes(self.config)
        self.settings = settings.model_copy(update={"capacity_bytes": capacity_bytes})
        self.seen = see_checkpoint(self.checkpoint, self.config)
        self.loader = LoaderThread()
        self.router_term = 0
        """The highest one heard: a router that was fenced stays so."""
