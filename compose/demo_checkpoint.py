"""The model that is served where nobody names one: the demo model, which lies in this folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from common.errors import CheckpointError

DEMO_CHECKPOINT = Path(__file__).parent / "demo" / "checkpoint"
DEMO_NAME = "moemesh-demo"
DEMO_QUESTION = "reverse the word planet"


def copy_demo_checkpoint(directory: Path) -> Path:
    """Makes `directory` the demo checkpoint as it is in this version, and returns it. Readers see all files or none.

    Raises CheckpointError where it cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        shutil.copytree(DEMO_CHECKPOINT, workplace, dirs_exist_ok=True)
        # Made for their owner alone; containers of one mesh may read as other users.
        workplace.chmod(0o755)
        for file in workplace.iterdir():
            file.chmod(0o644)
        # The volume may hold the demo model of an older version.
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(workplace, directory)
    except OSError as error:
        raise CheckpointError(f"cannot write the demo model to {directory}: {error.strerror}") from error
    return directory
