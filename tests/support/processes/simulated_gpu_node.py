"""`python -m tests.support.processes.simulated_gpu_node stage|expert`: that node; DEVICE=cuda is a simulated GPU."""

from __future__ import annotations

import importlib
import os
import sys

import torch

from common.compute.device import numeric_word
from common.node.loader_thread import LoaderThread
from common.node.process import end_process
from tests.support.nodes.simulated_gpu import SimulatedDevice, simulated_gpu, within_simulation

MODULES = {service: f"tests.support.processes.simulated_gpu_node {service}" for service in ("stage", "expert")}
"""For `LocalMesh.modules`."""


class NodeDevice(SimulatedDevice):
    """With a class of its own: its arithmetic is the processor's, its order of sums is a GPU's."""

    def numeric_class(self, variant: str) -> str:
        """As a GPU's."""
        return numeric_word("cuda", variant, "simulated", torch.__version__)


def main(service: str) -> int:
    """Exit status of the node."""
    process = importlib.import_module(f"services.{service}.process")
    entry = importlib.import_module(f"services.{service}.__main__")
    if not os.environ.get("DEVICE", "").startswith("cuda"):
        return int(entry.main())
    for module in (process, importlib.import_module("services.stage.ranks.worker")):
        vars(module)["open_device"] = lambda setting, **sharing: NodeDevice()
    if service == "stage":
        vars(process)["count_gpus"] = lambda: 1
    LoaderThread._run = within_simulation(LoaderThread._run)  # type: ignore[method-assign]
    with simulated_gpu():
        status: int = entry.main()
    return status


if __name__ == "__main__":
    end_process(main(sys.argv[1]))
