"""Training: six panels, each of which answers a question."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from egm_lib.evaluation.scoring import numeric
from egm_lib.evaluation.statistics import estimate
from egm_lib.files import read_jsonl, writable_row
from egm_lib.reports.figures.material import DRAWS, EGM, SMALL, Material, NotRun
from egm_lib.reports.figures.pieces import down_up
from egm_lib.viewer.page import steps_of
from egm_lib.viewer.palette import FAINT, new_figure, style_of

TASKS = {"vanilla": ("#0072B2", "-"), "amodal": ("#009E73", "--")}
SFT = "small-sft"
# How an answer reasons, by the number of places that it names (egm_lib.viewer.steps).
WAYS = {"no place": "#BDBDBD", "one place": "#E69F00", "several places": "#0072B2"}

Logs = dict[str, list[pd.DataFrame]]  # task -> one GRPO log a seed


def training(material: Material) -> tuple[Figure, str]:
    """What GRPO did: reward, accuracy, ways of reasoning, KL, length, groups with equal rewards."""
    logs: Logs = {task: [] for task in TASKS}
    for root in material.results.roots:
        for task in TASKS:
            frame = training_log(root / "logs" / f"grpo-{task}.jsonl")
            if len(frame):
                logs[task].append(frame)
    if not any(logs.values()):
        raise NotRun("no logs of GRPO (notebook 06)")
    figure = new_figure(9.6, 5.6)
    axes = figure.subplots(2, 3).ravel()
    _reward(axes[0], logs)
    _accuracy(axes[1], material)
    _ways(axes[2], material)
    _logged(axes[3], logs, "kl", "How far from the SFT model?", "KL divergence, nats a token")
    _logged(axes[4], logs, "completions/mean_length", "How long are answers?", "tokens")
    share = "groups whose rewards are all equal, %"
    _logged(axes[5], logs, "frac_reward_zero_std", "How many groups teach nothing?", share, 100)
    seeds = max(len(frames) for frames in logs.values())
    band = {
        1: "one seed, no interval",
        2: "mean and range of two seeds",
    }.get(seeds, f"mean of {seeds} seeds with a 95 % interval (t)")
    return (
        figure,
        "GRPO, by update step. Faint: as logged. Line: running mean over a tenth of the steps, "
        f"{band}. Accuracy and ways of reasoning come from the test predictions. Bars: 95 % "
        "intervals.",
    )


def training_log(path: Path) -> pd.DataFrame:
    """A training log with numeric columns, one row per step; empty if there is no log.

    Values that are not numbers become nan, and lines without a step are left out.
    """
    rows = read_jsonl(path) if path.is_file() else []
    frame = pd.DataFrame([writable_row(row) for row in rows])
    if "step" not in frame:
        return frame.iloc[:0]
    frame = frame.apply(numeric).dropna(subset="step")
    # Held-out prompts have a separate line for the same step
    return frame.groupby("step", as_index=False).last()


def _reward(ax: Axes, logs: Logs) -> None:
    held_out = False
    for task, frames in logs.items():
        for frame in frames:
            if "eval_reward" in frame:
                rows, held_out = frame.dropna(subset="eval_reward"), True
                look = {"color": TASKS[task][0], "markersize": 3, "zorder": 3}
                ax.plot(rows["step"], rows["eval_reward"], "o", **look)
    # After the points, so that the room for the legend is above them too
    _logged(ax, logs, "reward", "Does the reward rise?", "mean reward of a step")
    note = "points: held-out prompts" if held_out else "held-out prompts: not logged"
    ax.text(0.98, 0.03, note, transform=ax.transAxes, ha="right", fontsize=7, color=FAINT)


def _logged(
    ax: Axes, logs: Logs, column: str, question: str, unit: str, factor: float = 1.0
) -> None:
    """A logged column of all seeds, in one colour per task."""
    ax.set_title(question, fontsize=9)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)
    ax.tick_params(labelsize=7.5)
    for task, frames in logs.items():
        rows = [frame[["step", column]].dropna() for frame in frames if column in frame]
        rows = [frame.assign(**{column: factor * frame[column]}) for frame in rows if len(frame)]
        if rows:
            _curve(ax, rows, column, task)
    if ax.lines:
        _legend_above(ax)
        ax.grid(True)
        ax.xaxis.get_major_locator().set_params(integer=True)
    else:
        ax.text(0.5, 0.5, "not logged", ha="center", color=FAINT, transform=ax.transAxes)


def _legend_above(ax: Axes) -> None:
    """A legend in one row, and room for it above the data."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.18 * (top - bottom))
    ax.legend(fontsize=7.5, ncols=len(TASKS), loc="upper center")


def _curve(ax: Axes, frames: Sequence[pd.DataFrame], column: str, task: str) -> None:
    colour, line = TASKS[task]
    smooth = []
    for frame in frames:
        series = frame.set_index("step")[column].astype(float)
        # As pixels: thousands of points would make the PDF heavy.
        ax.plot(series.index, series, color=colour, alpha=0.25, linewidth=0.6, rasterized=True)
        smooth.append(series.rolling(max(1, len(series) // 10), min_periods=1, center=True).mean())
    table = pd.concat(smooth, axis=1, join="inner")
    mean, count = table.mean(axis=1), table.shape[1]
    marker = "o" if len(mean) == 1 else None
    ax.plot(mean.index, mean, line, color=colour, linewidth=1.5, marker=marker, label=task)
    half = stats.t.ppf(0.975, count - 1) * table.std(axis=1) / np.sqrt(count) if count > 2 else 0.0
    low, high = (table.min(axis=1), table.max(axis=1)) if count == 2 else (mean - half, mean + half)
    low = low.clip(lower=0.0)  # nothing that is drawn here can be negative
    band = {"alpha": 0.18, "linewidth": 0, "rasterized": True}
    ax.fill_between(mean.index, low, high, color=colour, **band)


def _accuracy(ax: Axes, material: Material) -> None:
    """Accuracy of the base, after SFT and after GRPO, with intervals."""
    ax.set_title("Are answers better afterwards?", fontsize=9)
    ax.set_ylabel("accuracy at IoU > 0.5, %", fontsize=8)
    chain = (SMALL, SFT, EGM)
    for (task, (colour, line)), shift in zip(TASKS.items(), (-0.06, 0.06), strict=True):
        points = [
            (index + shift, value)
            for index, model in enumerate(chain)
            if (value := _mean(material, model, task))
        ]
        if points:
            x, values = zip(*points, strict=True)
            y = [100 * value.mean for value in values]
            error = {"elinewidth": 1, "capsize": 2, "marker": "o", "markersize": 4}
            ax.errorbar(x, y, down_up(values), color=colour, linestyle=line, label=task, **error)
    ax.set_xticks(range(len(chain)), [style_of(model).label for model in chain], fontsize=7.5)
    ax.tick_params(axis="y", labelsize=7.5)
    ax.margins(x=0.2, y=0.15)
    if ax.lines:
        _legend_above(ax)
        ax.grid(True, axis="y")
    else:
        ax.text(0.5, 0.5, "not run", ha="center", color=FAINT, transform=ax.transAxes)


def _mean(material: Material, model: str, task: str):
    return estimate(material.results.of(model, task), over_splits=True, draws=DRAWS)


def _ways(ax: Axes, material: Material) -> None:
    """Share of answers whose reasoning names no, one or several places, before and after GRPO."""
    ax.set_title("How does it reason?", fontsize=9)
    ax.set_ylabel("share of answers, %", fontsize=8)
    bars = [
        (f"{label}\n{task}", shares)
        for task in TASKS
        for model, label in ((SFT, "SFT"), (EGM, "+ GRPO"))
        if (shares := ways_of_reasoning(material.results.of(model, task)))
    ]
    for index, (_, shares) in enumerate(bars):
        bottom = 0.0
        for way, colour in WAYS.items():
            label = way if index == 0 else None
            ax.bar(index, shares[way], 0.7, bottom, color=colour, label=label)
            bottom += shares[way]
    ax.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    ax.tick_params(axis="y", labelsize=7.5)
    if bars:
        ax.set_ylim(0, 128)
        ax.set_yticks(range(0, 101, 20))
        narrow = {"columnspacing": 0.7, "handlelength": 0.9, "handletextpad": 0.4}
        ax.legend(fontsize=6.5, loc="upper center", ncols=3, title="the trace names", **narrow)
    else:
        ax.text(0.5, 0.5, "not run", ha="center", color=FAINT, transform=ax.transAxes)


def ways_of_reasoning(rows: pd.DataFrame) -> dict[str, float]:
    """Percent of scored rows by WAYS; {} without rows."""
    if rows.empty:
        return {}
    fields = rows[["raw_answer", "status", "frame", "width", "height"]].to_dict("records")
    counts = np.array([len(steps_of(row)) for row in fields])
    several = 100 * float((counts > 1).mean())
    one = 100 * float((counts == 1).mean())
    return dict(zip(WAYS, (100 - one - several, one, several), strict=True))
