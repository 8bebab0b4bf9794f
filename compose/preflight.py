"""What can be known to be wrong before a process is started: settings against the model's own sizes."""

from __future__ import annotations

import os
from pathlib import Path

from common.checkpoint.directory import resolve_model
from common.checkpoint.model_config import read_model_config
from common.config import Settings
from services.router.control.sizes import plan_layers
from services.stage.model.tp_shard import check_degree


def check_before_start(settings: Settings) -> None:
    """Raises MoemeshError that names the setting. A model that has to be fetched first is left to the processes."""
    if not Path(os.path.expanduser(settings.model)).is_dir():
        return
    config = read_model_config(resolve_model(settings.model))
    plan_layers(config, settings.pp)
    if settings.tp > 1:
        check_degree(config, settings.tp)
