"""Training curves."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from egm_lib.files import read_jsonl
from egm_lib.reports.figures.material import Material, NotRun
from egm_lib.viewer.palette import (
    new_figure,
)

CURVES = (
    "loss",
    "mean_token_accuracy",
    "grad_norm",
    "reward",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "completions/mean_length",
)
TASKS = {"vanilla": ("#0072B2", "-"), "amodal": ("#009E73", "--")}


def training(material: Material) -> tuple[Figure, str]:
    logs: dict[str, dict[str, list[pd.DataFrame]]] = {}  # stage -> task -> a log a seed
    for root in material.results.roots:
        for file in sorted((root / "logs").glob("*.jsonl")):
            frame = pd.DataFrame(read_jsonl(file))
            stage, _, task = file.stem.rpartition("-")
            if task in TASKS and "step" in frame and any(column in frame for column in CURVES):
                logs.setdefault(stage, {name: [] for name in TASKS})[task].append(frame)
    if not logs:
        raise NotRun("no training logs (notebooks 04 and 06)")
    panels = [
        (
            stage,
            column,
            {
                task: own
                for task, frames in tasks.items()
                if (own := [f for f in frames if column in f])
            },
        )
        for stage, tasks in sorted(
            logs.items(), key=lambda item: (item[0] != "sft", item[0] != "grpo", item[0])
        )
        for column in CURVES
    ]
    panels = [panel for panel in panels if panel[2]]
    columns = min(5, len(panels))
    figure = new_figure(max(2.05 * columns, 4.2), 1.75 * -(-len(panels) // columns) + 0.4)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (stage, column, by_task) in zip(axes, panels, strict=False):
        for task, frames in by_task.items():
            _curve(ax, [frame.dropna(subset=column) for frame in frames], column, task)
        ax.set_title(f"{stage}: {column}", fontsize=7.5, fontweight="normal")
        ax.tick_params(labelsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    seeds = max(len(frames) for tasks in logs.values() for frames in tasks.values())
    band = {
        1: "one seed: no interval",
        2: "mean and range of two seeds: an interval of two would fill the panel",
    }.get(seeds, "mean of the seeds, 95 % interval (t)")
    return (
        figure,
        "Training logs against steps; faint: as logged; line: running mean of a tenth of the "
        f"steps, {band}.",
    )


def _curve(ax: Axes, frames: Sequence[pd.DataFrame], column: str, task: str) -> None:
    colour, line = TASKS[task]
    smooth = []
    for frame in frames:
        series = frame.drop_duplicates("step", keep="last").set_index("step")[column].astype(float)
        ax.plot(series.index, series, color=colour, alpha=0.3, linewidth=0.6)
        smooth.append(series.rolling(max(1, len(series) // 10), min_periods=1, center=True).mean())
    table = pd.concat(smooth, axis=1, join="inner")
    mean, count = table.mean(axis=1), table.shape[1]
    ax.plot(
        mean.index,
        mean,
        line,
        color=colour,
        linewidth=1.5,
        marker="o" if len(mean) == 1 else None,
        label=task,
    )
    half = stats.t.ppf(0.975, count - 1) * table.std(axis=1) / np.sqrt(count) if count > 2 else 0.0
    low, high = (table.min(axis=1), table.max(axis=1)) if count == 2 else (mean - half, mean + half)
    ax.fill_between(mean.index, low, high, color=colour, alpha=0.18, linewidth=0)
