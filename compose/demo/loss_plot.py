"""Draws what a training run logged: loss by task, and held-out accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

SMOOTHED_OVER_STEPS = 25


def plot_loss(log: Path, image: Path) -> None:
    """Reads the log lines of `train` and writes a PNG. Raises OSError where one of both cannot be."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, (losses, accuracies) = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True)
    for task in sorted({task for entry in entries for task in entry["tasks"]}):
        points = [(entry["tokens"] / 1e6, entry["tasks"][task]) for entry in entries if task in entry["tasks"]]
        x, y = np.array(points).T
        window = min(SMOOTHED_OVER_STEPS, len(y))
        losses.plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid"), label=task, linewidth=1)
        measured = [entry for entry in entries if "accuracy" in entry]
        accuracies.plot(
            [entry["tokens"] / 1e6 for entry in measured], [100 * entry["accuracy"][task] for entry in measured]
        )
    losses.set(ylabel="loss of an answer token (nats)", yscale="log")
    losses.legend(fontsize=7, ncols=3)
    accuracies.set(ylabel="held-out answers right (%)", xlabel="million tokens")
    figure.tight_layout()
    figure.savefig(image, dpi=110)
    pyplot.close(figure)
