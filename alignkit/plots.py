"""Plots of a run, as SVG files beside its results."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

BINS = 20  # of a training, in which weights are averaged


def trajectories(panels: dict[str, list[list[float]]], names: tuple[str, ...], file: Path) -> None:
    """How much each of K kinds of knowledge counted over a training: panel → (steps, K) weights, averaged in bins."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 2.6 * len(panels), 2.7), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, weights) in zip(axes[0], panels.items(), strict=True):
        bins = min(BINS, len(weights))
        edges = [i * len(weights) // bins for i in range(bins + 1)]
        for k, name in enumerate(names):
            means = [sum(w[k] for w in weights[a:b]) / (b - a) for a, b in pairwise(edges)]
            axis.plot([(i + 0.5) / bins for i in range(bins)], means, label=name)
        axis.set(title=title, xlabel="share of training", xlim=(0, 1))
    axes[0][0].set(ylabel="weight", ylim=(0, None))
    axes[0][-1].legend(fontsize=7)
    _save(figure, file)


def losses(curves: list[list[float]], lines: dict[str, list[float]], file: Path) -> None:
    """Held-out loss over the phases of an episode: each curve thin and grey, the later the darker; what is lowest at each
    phase in black; named lines beside."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    phases = range(1, len(curves[0]) + 1)
    for i, curve in enumerate(curves):
        axis.plot(phases, curve, color=str(0.85 - 0.5 * i / len(curves)), linewidth=0.8)
    axis.plot(phases, [min(x) for x in zip(*curves, strict=True)], color="black", label="lowest at each phase")
    for name, line in lines.items():
        axis.plot(phases, line, label=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="phase of an episode, the later episodes darker", ylabel="loss on reward rows")
    axis.legend(fontsize=7)
    _save(figure, file)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "alignkit"  # the same numbers give the same file
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, file: Path) -> None:
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    partial.rename(file)
    _pyplot().close(figure)
