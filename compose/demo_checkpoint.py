"""The model that is served where none is named: the demo model, which lies in this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.errors import CheckpointError
from compose.checkpoint_folder import whole_folder

DEMO_CHECKPOINT = Path(__file__).parent / "demo" / "checkpoint"
DEMO_NAME = "moemesh-demo"
DEMO_QUESTION = "reverse the word planet"


def copy_demo_checkpoint(directory: Path) -> Path:
    """Makes `directory` the demo checkpoint as it is in this version, and returns it. Readers see all files or none.

    Raises CheckpointError where it cannot be written.
    """
    try:
        with whole_folder(directory) as workplace:
            shutil.copytree(DEMO_CHECKPOINT, workplace, dirs_exist_ok=True)
            # The volume may hold the demo model of an older version.
            shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the demo model to {directory}: {error.strerror}") from error
    return directory
