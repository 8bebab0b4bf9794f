"""What a container of the mesh starts with: where the checkpoint is inside it, then the process itself.

    python -m compose.container prepare            make, fetch or check the checkpoint, then end
    python -m compose.container services.stage     become that process
    python -m compose.container health             exit status 0 once the mesh is ready; then, if the router answers

MODEL is written for people: a directory of the host, a hub name, or nothing. Inside, /checkpoint is the host's
directory, or the volume that `prepare` has filled.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.processes.local_http import open_local
from compose.demo_checkpoint import DEMO_NAME, copy_demo_checkpoint

CHECKPOINT_MOUNT = Path("/checkpoint")
"""Read-only in every container."""

VOLUME_MOUNT = Path("/models")
"""The same volume, writable: only `prepare` has it."""

HEALTH_TIMEOUT_S = 3.0

READY_BEFORE = Path("/tmp/moemesh-was-ready")
"""A file in the router's container, from its start on."""


def process_environment(environment: Mapping[str, str], mount: Path = CHECKPOINT_MOUNT) -> dict[str, str]:
    """Returns the environment with MODEL as this container sees it, and a served name that does not depend on the
    mount."""
    model = environment.get("MODEL", "")
    result = dict(environment)
    if not model:
        result["MODEL"] = str(mount / DEMO_NAME)
        default_name = DEMO_NAME
    elif is_hub_name(environment):
        # Filled by `prepare`, read-only here: the hub must not be asked again by every node.
        result |= {"HF_HOME": str(mount), "HF_HUB_OFFLINE": "1"}
        default_name = model.rsplit("/", 1)[-1]
    else:
        result["MODEL"] = str(mount)
        default_name = Path(model).name or mount.name
    result["SERVED_NAME"] = environment.get("SERVED_NAME") or default_name
    return result


def is_hub_name(environment: Mapping[str, str]) -> bool:
    """Compose cannot tell a hub name from a directory; the person says it by MODEL_SOURCE, the volume to fill."""
    return bool(environment.get("MODEL")) and bool(environment.get("MODEL_SOURCE"))


def prepare(environment: Mapping[str, str]) -> str:
    """Fills the volume or checks the mounted directory; the sentence that says what is served. Raises MoemeshError."""
    from common.errors import CheckpointError

    model = environment.get("MODEL", "")
    if not model:
        return f"demo model in {copy_demo_checkpoint(VOLUME_MOUNT / DEMO_NAME)}"
    if is_hub_name(environment):
        os.environ["HF_HOME"] = str(VOLUME_MOUNT)
        from common.checkpoint.directory import resolve_model  # the hub's library reads HF_HOME when it is imported

        return f"{model} in {resolve_model(model)}"
    if not os.access(CHECKPOINT_MOUNT, os.R_OK | os.X_OK):
        raise CheckpointError(
            f"MODEL={model} cannot be read by user {os.getuid()} of the containers: "
            "`chmod -R o+rX` it, or set CONTAINER_USER to a user id that can"
        )
    if not (CHECKPOINT_MOUNT / "config.json").is_file():
        raise CheckpointError(f"MODEL={model} holds no config.json that the containers can see")
    return f"{model}, mounted from the host"


def is_healthy(port: str, ready_before: Path = READY_BEFORE) -> bool:
    """Returns whether the mesh is ready for the first time (`docker compose up --wait` waits for that); from then on,
    whether the router answers: it is not ill where nodes are missing, and must not be replaced for it."""
    if ready_before.exists():
        return router_answers(port, "/health")
    if not router_answers(port, "/ready"):
        return False
    ready_before.touch()
    return True


def router_answers(port: str, path: str) -> bool:
    """Returns whether GET answers 200 within its time limit."""
    try:
        with open_local(f"http://127.0.0.1:{port}{path}", HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Ends with an exit status, or becomes the process that is named."""
    (task,) = arguments
    if task == "health":
        return 0 if is_healthy(os.environ["PORT"]) else 1
    if task == "prepare":
        from common.errors import MoemeshError

        try:
            print(f"checkpoint: {prepare(os.environ)}")
        except MoemeshError as error:
            print(f"checkpoint: {error.message}", file=sys.stderr)
            return 2
        return 0
    become(task)
    return 0


def become(module: str) -> None:
    """Runs the module as this process."""
    # Told to stop before it serves it has nothing to leave, and importing torch takes seconds; once it serves it has
    # installed a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    os.environ.update(process_environment(os.environ))
    if module == "services.router":
        READY_BEFORE.unlink(missing_ok=True)  # of this container before it was stopped
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
