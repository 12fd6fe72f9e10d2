"""The held-out loss over the number of depth steps, a line for each evaluation: the figure of a run in TensorBoard."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure


def draw_curve(evaluations: Mapping[int, Mapping[int, float]], *, shown: int = 8) -> Figure:
    """Returns the figure of losses by steps, given by the update after which they were measured: a line for each of the
    last `shown` updates, the newest in black."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    newest = sorted(evaluations)[-shown:]
    for update, grey in zip(newest, np.linspace(0.8, 0.0, len(newest)), strict=True):
        losses = sorted(evaluations[update].items())
        axes.plot(*zip(*losses, strict=True), "o-", color=str(grey), label=f"update {update}", markersize=4)
    axes.set_xlabel("depth steps")
    axes.set_ylabel("held-out loss, nats/token")
    axes.set_xscale("log")
    counts = sorted({count for losses in evaluations.values() for count in losses})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    return figure
