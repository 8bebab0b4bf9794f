"""A checkpoint in the form that stores a layer's experts as one tensor."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def fuse_experts(source: Path, directory: Path) -> Path:
    """The same Qwen3-MoE model with gate and up rows of all experts in one tensor [E, 2F, D], and down in another."""
    directory.mkdir()
    for file in source.glob("*.json"):
        shutil.copyfile(file, directory / file.name)
    tensors = load_file(source / "model.safetensors")
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in list(tensors):
        if found := _EXPERT.fullmatch(name):
            prefix, number, projection = found.groups()
            experts.setdefault(prefix, {}).setdefault(int(number), {})[projection] = tensors.pop(name)
    for prefix, layer in experts.items():
        ordered = [layer[number] for number in sorted(layer)]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([own["gate"], own["up"]]) for own in ordered])
        tensors[f"{prefix}.down_proj"] = torch.stack([own["down"] for own in ordered])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
