"""Which experts a task goes to: python -m compose.demo.routing_report RUN [--image PNG]

Counts the gate's choices on held-out questions, layer by layer; prints task x expert shares; the image is a heat map.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from compose.demo.dataset import NO_TARGET, ChatMaker
from compose.demo.export import load_run
from compose.demo.model import DemoModel
from compose.demo.tasks.catalog import TASKS, WEIGHTS
from compose.demo.tokenizer import build_tokenizer

CHATS_PER_TASK = 200


@torch.no_grad()
def expert_shares(model: DemoModel, maker: ChatMaker, chats_per_task: int, seed: int) -> Tensor:
    """[tasks, layers, experts]: share of an answer's rows that each expert takes; a layer's shares sum to 1."""
    sizes = model.sizes
    counts = torch.zeros(len(TASKS), sizes.layers, sizes.experts)
    for index, task in enumerate(TASKS):
        for batch in maker.held_out(task, chats_per_task, seed):
            is_answer = batch.targets.flatten() != NO_TARGET
            _, _, choices = model(batch.ids)
            for layer, chosen in enumerate(choices):
                counts[index, layer] += chosen[is_answer].flatten().bincount(minlength=sizes.experts)
    return counts / counts.sum(dim=-1, keepdim=True)


def markdown(shares: Tensor, layer: int) -> str:
    """Returns one layer's table: tasks down, experts across, in percent."""
    num_experts = shares.shape[-1]
    lines = [f"| task | {' | '.join(map(str, range(num_experts)))} |", "| --- |" + " ---: |" * num_experts]
    for task, row in zip(TASKS, shares[:, layer].tolist(), strict=True):
        lines.append(f"| {task.name} | " + " | ".join(f"{share:.0%}" for share in row) + " |")
    return "\n".join(lines)


def most_telling_layer(shares: Tensor) -> int:
    """Returns the layer whose shares differ most from task to task."""
    spread = (shares - shares.mean(dim=0, keepdim=True)).abs().sum(dim=(0, 2))
    return int(spread.argmax())


def draw_heat_map(shares: Tensor, image: Path) -> None:
    """All layers beside each other. Raises OSError where the image cannot be written."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_layers, num_experts = shares.shape[1:]
    figure, axes = pyplot.subplots(1, num_layers, figsize=(2 + 2.4 * num_layers, 5), sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        picture = axis.imshow(shares[:, layer], vmin=0, vmax=float(shares.max()), cmap="viridis", aspect="auto")
        axis.set(title=f"layer {layer}", xlabel="expert", xticks=range(num_experts))
    axes[0][0].set_yticks(range(len(TASKS)), [task.name for task in TASKS])
    figure.colorbar(picture, ax=axes[0].tolist(), label="share of an answer's rows")
    figure.savefig(image, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m compose.demo.routing_report", description="Experts by task.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--image", type=Path)
    parsed = parser.parse_args(arguments)
    model, _ = load_run(parsed.run)
    shares = expert_shares(model, ChatMaker(build_tokenizer(TASKS), TASKS, WEIGHTS), CHATS_PER_TASK, seed=1)
    layer = most_telling_layer(shares)
    print(f"Layer {layer}, share of an answer's rows by expert:\n\n{markdown(shares, layer)}")
    if parsed.image:
        draw_heat_map(shares, parsed.image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
