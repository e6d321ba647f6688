"""The paper's figures, and a few that it lacks, from a run's files alone: no model needed.

    python -m egm_lib.figures --profile mini [--only fig5]

Every figure goes to figures/<profile>/ as PNG and PDF; figures.json says what each shows, or why it
was not run. Examples are drawn by lot (a fixed one) from all that qualify, never picked by hand.
"""

import argparse
import json
import random
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from scipy import stats

from egm_lib.comparison import Comparison, compare, reasoning_and_answer, rows_of, view_of
from egm_lib.data.records import atomic_open
from egm_lib.drawing import (
    comparison_height_in,
    draw_comparison,
    draw_group,
    draw_picture,
    group_height_in,
    swatch,
    text_width_pt,
    verdict,
)
from egm_lib.evaluation import Estimate, estimate, pair, read_rows
from egm_lib.palette import (
    FAILED,
    FAINT,
    GRID,
    GROUND_TRUTH,
    INK,
    SOLVED,
    look,
    new_figure,
    save,
    styled,
)
from egm_lib.profile import ProfileError, Run, load_profile
from egm_lib.results import Results, paper
from egm_lib.tables.cells import decimal_text
from egm_lib.tables.own import latency_stats
from egm_lib.tables.published import cause_shares, counted_failures

SMALL, EGM, LARGE = "small-base", "small-egm", "large-base"
DRAWS = 1000  # of a bootstrap


class NotRun(Exception):
    """The files that a figure needs are not there; the message says which."""


@dataclass(frozen=True)
class Drawn:
    """A figure that was made (files) or was not (not_run says why)."""

    name: str
    title: str
    caption: str = ""
    not_run: str = ""
    files: tuple[str, ...] = ()


class Material:
    """What figures are made of: scored results, whole prediction rows where text or pictures are
    shown, parameters.
    """

    def __init__(self, results: Results, root: Path, parameters: Mapping[str, int]):
        self.results, self.root, self.parameters = results, root, parameters

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The first seed's small base, EGM and large base, sample by sample."""
        folder = self.results.roots[0] / "predictions"
        return compare(
            rows_of([folder / name for name in (SMALL, EGM, LARGE) if (folder / name).is_dir()])
        )

    def of(self, task: str) -> list[Comparison]:
        return [each for each in self.comparisons if each.sample["task"] == task]

    def needed(self, model: str, task: str = "vanilla") -> pd.DataFrame:
        rows = self.results.of(model, task)
        if rows.empty:
            raise NotRun(f"no {task} predictions of {model}")
        return rows


def lot(items: Sequence, count: int) -> list:
    """`count` of the items by a fixed lot, in their order."""
    chosen = sorted(random.Random(0).sample(range(len(items)), min(count, len(items))))
    return [items[place] for place in chosen]


def fig5(material: Material) -> tuple[Figure, str]:
    results = material.results
    points = {
        model: (latency, value)
        for model in results.models
        if (latency := latency_stats(results, model))
        and (value := estimate(results.of(model), over_splits=True, draws=DRAWS))
    }
    if not points:
        raise NotRun("no latency rows beside predictions (python -m egm_lib.generate --latency)")
    figure = new_figure(9.2, 4.0)
    left, right = figure.subplots(1, 2)
    _published_latency(left)
    sizes = [material.parameters.get(model) for model in points]
    largest = max((size for size in sizes if size), default=None)
    for (model, (latency, value)), size in zip(points.items(), sizes, strict=True):
        style = look(model)
        area = 380 * size / largest if size else 60
        _errors(right, latency["mean"], latency["ci95"], value, style.colour)
        right.scatter(
            latency["mean"],
            100 * value.mean,
            s=max(area, 18),
            color=style.colour,
            marker=style.marker,
            edgecolor="white",
            zorder=3,
            label=f"{style.label}{_millions(size)}",
        )
    right.set(
        title="This run", xlabel="latency of one request, ms", ylabel="accuracy at IoU > 0.5, %"
    )
    right.margins(0.18)
    right.grid(True)
    right.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=3,
        fontsize=7.5,
        markerscale=0.6,
        columnspacing=1,
    )
    note = (
        "area in proportion to the parameters"
        if largest
        else "parameters not recorded: equal areas"
    )
    caption = f"Accuracy against latency, the paper's models and ours ({note}; bars: 95 %). "
    return (
        figure,
        caption + "The panels were measured on different machines: compare within a panel.",
    )


def _errors(ax: Axes, x: float, x_ci, value: Estimate, colour: str) -> None:
    x_error = [[x - x_ci[0]], [x_ci[1] - x]] if x_ci else None
    ax.errorbar(
        x,
        100 * value.mean,
        _down_up([value]),
        x_error,
        fmt="none",
        color=colour,
        linewidth=1,
        zorder=2,
    )


def _published_latency(ax: Axes) -> None:
    families = (
        ("Qwen3-VL Instruct", "#009E73", "o"),
        ("Qwen3-VL Thinking", "#E69F00", "^"),
        ("InternVL-3", "#8A8A8A", "s"),
        ("EGM-Qwen3-VL", "#0072B2", "D"),
    )
    rows = paper("fig5")["rows"]
    for family, colour, marker in families:
        head, _, tail = family.partition(" ")
        own = [row for row in rows if row["name"].startswith(head) and row["name"].endswith(tail)]
        if not own:
            continue
        x, y = zip(*(row["values"] for row in own), strict=True)
        billions = [_billions(row["name"]) for row in own]
        ax.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        areas = [14 + 22 * size**0.5 for size in billions]
        ax.scatter(
            x, y, s=areas, color=colour, marker=marker, edgecolor="white", zorder=3, label=family
        )
        for row, size, area in zip(own, billions, areas, strict=True):
            off = area**0.5 / 2 + 1.5  # points; clear of the marker, at a side where no line goes
            side = {"xytext": (-off, off), "ha": "right", "va": "center"}
            if row is own[-1]:
                side = {"xytext": (0, -off), "ha": "center", "va": "top"}
            ax.annotate(
                f"{size:g}B",
                row["values"],
                textcoords="offset points",
                fontsize=7,
                color=INK,
                **side,
            )
    ax.set(
        xscale="log",
        title="Published (Fig. 5)",
        xlabel="latency, ms",
        ylabel="accuracy at IoU > 0.5, %",
    )
    ax.margins(0.09)
    ax.grid(True)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=2,
        fontsize=7.5,
        markerscale=0.7,
        columnspacing=1,
    )


def _billions(name: str) -> float:
    return next(
        float(part[:-1]) for part in name.split("-") if part.endswith("B") and part[:-1].isdigit()
    )


def _millions(size: int | None) -> str:
    return (
        f", {size / 1e9:.1f} B" if size and size >= 1e9 else f", {size / 1e6:.1f} M" if size else ""
    )


def fig2(material: Material) -> tuple[Figure, str]:
    results = material.results
    judged = {model: results.majority_causes(model) for model in (SMALL, LARGE)}
    shares = {
        model: cause_shares(causes, DRAWS) for model, causes in judged.items() if not causes.empty
    }
    if not shares:
        raise NotRun("no judged failures (notebook 01)")
    source = paper("table1")
    causes = [row["name"] for row in source["rows"]]
    figure = new_figure(7.6, 3.2)
    ax = figure.subplots()
    bars = 1 + len(shares)
    places = np.arange(len(causes))[::-1].astype(float)
    height = 0.8 / bars
    ax.barh(
        places + 0.4 - height / 2,
        [row["values"][0] for row in source["rows"]],
        height,
        color="#CFCFCF",
        label="paper: InternVL-3-8B, judged by GPT-4",
    )
    for number, (model, by_cause) in enumerate(shares.items(), 1):
        y = places + 0.4 - height * (number + 0.5)
        values = [by_cause[cause] for cause in causes]
        style = look(model)
        hatch = "///" if model == LARGE else ""
        total = counted_failures(values[0].n, judged[model]["seed"].nunique())
        ax.barh(
            y,
            [100 * value.mean for value in values],
            height,
            color=style.colour,
            hatch=hatch,
            edgecolor="white",
            label=f"{style.label}: {total}",
        )
        ax.errorbar(
            [100 * value.mean for value in values],
            y,
            xerr=_down_up(values),
            fmt="none",
            color=INK,
            linewidth=0.9,
        )
    ax.set(
        yticks=places,
        yticklabels=causes,
        xlabel="share of a model's failures, %",
        title="Why the box is wrong",
    )
    ax.grid(True, axis="x")
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower right")
    judges = ", ".join(results.judges)
    return (
        figure,
        f"Causes of failure by the majority of the judges ({judges}); bars: 95 %. Grey: the paper.",
    )


def fig2_examples(material: Material) -> tuple[Figure, str]:
    causes = material.results.majority_causes(SMALL)
    seed = material.results.seeds[0]
    cause_of = {row.sample_id: row.cause for row in causes.itertuples() if row.seed == seed}
    if not cause_of:
        raise NotRun(f"no judged failures of {SMALL} (notebook 01)")
    failed = [each for each in material.of("vanilla") if each.failed(SMALL)]
    picked = []
    for row in paper("table1")["rows"]:
        own = [each for each in failed if cause_of.get(each.sample["sample_id"]) == row["name"]]
        picked += [(row["name"], each) for each in lot(own, 1)]
    if not picked:
        raise NotRun("the judged failures have no prediction rows")
    figure = new_figure(2.2 * max(len(picked), 2), 3.2)
    for ax, (cause, each) in zip(
        figure.subplots(1, len(picked), squeeze=False)[0], picked, strict=True
    ):
        draw_picture(ax, each.sample, [(each.answers[SMALL].box, look(SMALL))], material.root)
        ax.set_title(cause, fontsize=8)
        ax.text(
            0,
            -0.03,
            textwrap.fill(f"“{each.sample['expression']}”", 32),
            va="top",
            fontsize=7.5,
            transform=ax.transAxes,
        )
    _legend(figure, [SMALL])
    return figure, "A failure of the small base by cause, drawn by lot."


def fig3(material: Material) -> tuple[Figure, str]:
    rows = []
    for task in ("vanilla", "amodal"):
        file = material.results.roots[0] / "traces" / f"{task}.jsonl"
        if file.is_file():
            own = [
                row
                for row in read_rows(file)
                if row.get("reasoning") and row.get("gt_box") and row.get("image")
            ]
            rows += [(task, row) for row in lot(own, 2)]
    if not rows:
        raise NotRun("no curated traces (notebooks 02 and 03)")
    figure = new_figure(8.6, 2.15 * ((len(rows) + 1) // 2))
    axes = figure.subplots(
        (len(rows) + 1) // 2, 4, width_ratios=(1, 1.15, 1, 1.15), squeeze=False
    ).ravel()
    for ax in axes[2 * len(rows) :]:
        ax.set_axis_off()
    for place, (task, row) in enumerate(rows):
        draw_picture(axes[2 * place], row, [], material.root)
        axes[2 * place].set_title(f"{task}", fontsize=8, color=FAINT, fontweight="normal")
        _say(
            axes[2 * place + 1],
            [
                (f"“{row['expression']}”", INK, 34, 8.5, "bold"),
                (row["reasoning"], INK, 36, 7.5, "normal"),
            ],
        )
    return (
        figure,
        "Curated reasoning: the target's box (hatched where hidden) and the trace that the teacher wrote.",
    )


def _side_by_side(
    material: Material, task: str, wanted: Sequence[tuple[str, Callable, int]]
) -> tuple[Figure, str]:
    pool = [each for each in material.of(task) if SMALL in each.answers and EGM in each.answers]
    if not pool:
        raise NotRun(f"no {task} samples that both {SMALL} and {EGM} answered")
    picked = []
    for title, suits, count in wanted:
        own = [each for each in pool if suits(each)]
        picked += [(f"{title} ({len(own)} of {len(pool)})", each) for each in lot(own, count)]
    if not picked:
        raise NotRun(f"no {task} sample of the kinds to show")
    figure = new_figure(9.0, 2.35 * len(picked))
    axes = figure.subplots(len(picked), 3, width_ratios=(1, 1, 1.7), squeeze=False)
    for (first, second, text), (title, each) in zip(axes, picked, strict=True):
        lines = [
            (title, FAINT, 60, 7.5, "normal"),
            (f"“{each.sample['expression']}”", INK, 46, 9, "bold"),
        ]
        for ax, model in ((first, SMALL), (second, EGM)):
            answer = each.answers[model]
            draw_picture(ax, each.sample, [(answer.box, look(model))], material.root)
            said = textwrap.shorten(verdict(answer), 34)
            ax.set_title(
                f"{look(model).label}: {said}",
                fontsize=8,
                color=SOLVED if answer.success else FAILED,
            )
        reasoning, _ = reasoning_and_answer(each.answers[EGM].row)
        lines.append((textwrap.shorten(reasoning or "(no reasoning)", 520), INK, 56, 7.5, "normal"))
        _say(text, lines)
    _legend(figure, [SMALL, EGM])
    kinds = "; ".join(dict.fromkeys(title for title, _ in picked))
    return (
        figure,
        f"Small base beside small + EGM and its reasoning, samples drawn by lot among: {kinds}.",
    )


_FIXED = ("EGM solves what the base misses", lambda each: each.failed(SMALL) and each.solved(EGM))
_BROKEN = ("EGM misses what the base solves", lambda each: each.solved(SMALL) and each.failed(EGM))
_BOTH_MISS = ("both miss", lambda each: each.failed(SMALL) and each.failed(EGM))


def fig4(material: Material) -> tuple[Figure, str]:
    return _side_by_side(material, "vanilla", [(*_FIXED, 3)])


def fig6(material: Material) -> tuple[Figure, str]:
    return _side_by_side(material, "amodal", [(*_FIXED, 2), (*_BROKEN, 1)])


def fig12(material: Material) -> tuple[Figure, str]:
    return _side_by_side(material, "vanilla", [(*_BROKEN, 2), (*_BOTH_MISS, 2)])


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
            frame = pd.DataFrame(read_rows(file))
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
        f"Training logs against steps; faint: as logged; line: running mean of a tenth of the steps, {band}.",
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


def iou_histogram(material: Material) -> tuple[Figure, str]:
    tasks = [task for task in ("vanilla", "amodal") if not material.results.of(EGM, task).empty]
    if not tasks:
        raise NotRun(f"no predictions of {EGM}")
    figure = new_figure(4.4 * len(tasks), 3.0)
    bins = np.linspace(0, 1, 21)
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for model in (SMALL, EGM):
            rows, style = material.needed(model, task), look(model)
            share_B = 100 * np.histogram(rows["iou"], bins)[0] / len(rows)
            line = (0, style.dash) if style.dash else "-"
            ax.stairs(
                share_B,
                bins,
                color=style.colour,
                linewidth=1.8,
                linestyle=line,
                label=f"{style.label} (n = {len(rows):,})",
            )
            if model == EGM:
                ax.stairs(share_B, bins, fill=True, color=style.colour, alpha=0.15)
        ax.axvline(0.5, color=FAINT, linewidth=0.9, linestyle=":")
        ax.set(
            title=task,
            xlabel="IoU with the ground truth",
            ylabel="share of samples, %",
            xlim=(0, 1),
        )
        ax.legend(loc="upper center")
        ax.grid(True, axis="y")
    return (
        figure,
        "IoU before (small base) and after (small + EGM); right of the dotted line is a success.",
    )


def solved_share(material: Material) -> tuple[Figure, str]:
    both = _paired(material)
    failed = both[~both["a"].astype(bool)]
    if failed.empty:
        raise NotRun("the base failed nowhere")
    edges = [-1e-9, 0, 0.1, 0.2, 0.3, 0.4, 0.5]
    labels = ["0", "to 0.1", "0.1-0.2", "0.2-0.3", "0.3-0.4", "0.4-0.5"]
    bins = pd.cut(failed["base_iou"], edges, labels=labels)
    figure = new_figure(6.4, 3.1)
    ax = figure.subplots()
    groups = [(label, failed[bins == label]) for label in labels]
    for place, (_, rows) in enumerate(groups):
        value = estimate(rows, "b", draws=DRAWS)
        if value is None:
            ax.text(place, 1, "none", ha="center", fontsize=7.5, color=FAINT)
            continue
        ax.bar(place, 100 * value.mean, 0.72, color=SOLVED, alpha=0.85)
        ax.errorbar(
            place, 100 * value.mean, _down_up([value]), fmt="none", color=INK, linewidth=0.9
        )
    overall = 100 * failed["b"].mean()
    published = paper("table11")["rows"][0]["values"][2]
    ax.axhline(
        overall, color=SOLVED, linewidth=1.2, label=f"all failures: {decimal_text(overall)} %"
    )
    ax.axhline(
        published,
        color=FAINT,
        linewidth=1.2,
        linestyle="--",
        label=f"paper, Table 11: {published} %",
    )
    counted = [f"{label}\nn = {len(rows)}" for label, rows in groups]
    ax.set(
        xticks=range(len(labels)),
        xticklabels=counted,
        ylabel="solved by small + EGM, %",
        ylim=(0, 100),
        xlim=(-0.6, len(labels) - 0.4),
        xlabel="IoU of the small base",
        title="Of the base's failures, how many are solved",
    )
    figure.legend(loc="outside lower center", ncols=2)
    ax.grid(True, axis="y")
    count = f"{len(failed):,} failures of the small base"
    return (
        figure,
        f"Share of the {count} that small + EGM solves, by the IoU of the base (Table 11).",
    )


def _paired(material: Material) -> pd.DataFrame:
    base, egm = material.needed(SMALL), material.needed(EGM)
    both = pair(base, egm).astype({"a": float, "b": float})
    return both.merge(
        base[["sample_id", "seed", "iou"]].rename(columns={"iou": "base_iou"}),
        on=["sample_id", "seed"],
    )


def lookalikes(material: Material) -> tuple[Figure, str]:
    models = [
        model
        for model in (SMALL, "small-sft", EGM, "small-direct-control", LARGE)
        if not material.results.of(model).empty
    ]
    scored = material.results.scored
    known = scored[(scored["task"] == "vanilla") & scored["model"].isin(models)]
    strata = [name for name in ("num_lookalikes", "prompt_kind") if known[name].notna().any()]
    if not strata:
        raise NotRun(
            "no predictions, or samples that tell neither look-alikes nor the kind of prompt"
        )
    figure = new_figure(9.2, 3.5)
    axes = figure.subplots(1, len(strata), squeeze=False, width_ratios=[1, 1.5][: len(strata)])[0]
    for ax, stratum in zip(axes, strata, strict=True):
        values = sorted(known[stratum].dropna().unique())
        for number, model in enumerate(models):
            style, own = look(model), known[known["model"] == model]
            found = [
                (place, value)
                for place, key in enumerate(values)
                if (value := estimate(own[own[stratum] == key], draws=DRAWS))
            ]
            shift = (number - (len(models) - 1) / 2) * 0.12
            x = [place + shift for place, _ in found]
            joined = (0, style.dash) if style.dash else "-"
            ax.errorbar(
                x,
                [100 * value.mean for _, value in found],
                _down_up([value for _, value in found]),
                color=style.colour,
                marker=style.marker,
                markersize=5,
                linewidth=1.3,
                elinewidth=0.9,
                linestyle=joined if stratum == "num_lookalikes" else "none",
                label=style.label,
            )
        names = [f"{value:g}" if isinstance(value, int | float) else str(value) for value in values]
        ax.set(
            xticks=range(len(values)),
            xticklabels=names,
            ylabel="accuracy at IoU > 0.5, %",
            ylim=(0, 102),
            title={"num_lookalikes": "by look-alikes", "prompt_kind": "by kind of prompt"}[stratum],
        )
        if stratum == "prompt_kind" and len(values) > 4:
            ax.set_xticks(
                range(len(values)), names, rotation=35, ha="right", rotation_mode="anchor"
            )
        ax.grid(True, axis="y")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(models)
    )
    return (
        figure,
        "Accuracy on the vanilla splits by what makes a prompt hard; bars: 95 %, clustered on pictures.",
    )


def overview(material: Material) -> tuple[Figure, str]:
    """The picture at the top of the README."""
    fixed = [each for each in material.of("vanilla") if _FIXED[1](each)]
    if not fixed:
        raise NotRun(f"no vanilla sample that {EGM} solves and {SMALL} misses")
    [each] = lot(fixed, 1)
    models = (SMALL, "small-direct-control", "small-sft", "small-sft-control", EGM, LARGE)
    values = {
        model: value
        for model in models
        if (value := estimate(material.results.of(model), over_splits=True, draws=DRAWS))
    }
    figure = new_figure(10.4, 3.3)
    first, text, bars = figure.subplots(1, 3, width_ratios=(1.15, 1.35, 1.25))
    shown = [(each.answers[model].box, look(model)) for model in (SMALL, EGM)]
    draw_picture(first, each.sample, shown, material.root)
    reasoning, _ = reasoning_and_answer(each.answers[EGM].row)
    _say(
        text,
        [
            (f"“{each.sample['expression']}”", INK, 36, 11, "bold"),
            (
                f"small base answers at once: {verdict(each.answers[SMALL])}",
                FAILED,
                50,
                8.5,
                "bold",
            ),
            (
                f"small + EGM thinks, then answers: {verdict(each.answers[EGM])}",
                SOLVED,
                50,
                8.5,
                "bold",
            ),
            (textwrap.shorten(reasoning or "", 330, placeholder=" ..."), INK, 46, 8.5, "normal"),
        ],
    )
    for place, (model, value) in enumerate(values.items()):
        style = look(model)
        bars.barh(-place, 100 * value.mean, 0.66, color=style.colour)
        bars.errorbar(
            100 * value.mean, -place, xerr=_down_up([value]), fmt="none", color=INK, linewidth=1
        )
        end = 100 * (value.ci95[1] if value.ci95 else value.mean)
        bars.text(end + 1.5, -place, decimal_text(100 * value.mean), va="center", fontsize=9)
    bars.set(
        yticks=[-place for place in range(len(values))],
        yticklabels=[look(model).label for model in values],
        xlabel="accuracy at IoU > 0.5, %",
        xlim=(0, 108),
    )
    bars.tick_params(axis="y", length=0)
    bars.grid(True, axis="x")
    _legend(figure, [SMALL, EGM])
    caption = "A small model that thinks before it points. A sample drawn by lot; mean over the splits, 95 % intervals."
    return figure, caption


def viewer(material: Material) -> tuple[Figure, str]:
    """How the trace viewer shows a sample, and a GRPO group where one was kept: for pages that run
    no widgets.
    """
    fixed = [
        each for task in ("amodal", "vanilla") for each in material.of(task) if _FIXED[1](each)
    ]
    if not fixed:
        raise NotRun(f"no sample that {EGM} solves and {SMALL} misses")
    each, width_in = lot(fixed, 1)[0], 9.2
    models = [model for model in (SMALL, EGM, LARGE) if model in each.answers]
    heights_in = [0.42, comparison_height_in(each, models)]
    if kept := _mixed_group(material):
        group = view_of(Comparison(kept, {}), [], root=material.root, group=kept)["group"]
        heights_in.append(group_height_in(group, kept, width_in))
    figure = new_figure(width_in, sum(heights_in))
    bar, main, *below = figure.subfigures(len(heights_in), 1, height_ratios=heights_in)
    words = [
        "‹",
        f"{fixed.index(each) + 1} of {len(fixed)} (all: {len(material.comparisons)})",
        "›",
    ]
    words += [
        "B solves what A misses",
        f"A {look(SMALL).label}",
        f"B {look(EGM).label}",
        "split: any",
        "sort: as read",
    ]
    _controls(bar, [*words, "PNG", "SVG"])
    draw_comparison(main, each, models, material.root)
    if kept:
        draw_group(below[0], group, kept, material.root)
    caption = "The trace viewer, at a sample drawn by lot"
    return (
        figure,
        f"{caption}; beneath it, a GRPO group: rewards r, advantages A." if kept else f"{caption}.",
    )


def _mixed_group(material: Material) -> Mapping | None:
    """Of the kept GRPO groups in which some completions hit and some miss, one by lot."""
    files = [
        material.results.roots[0] / "groups" / f"{task}.jsonl" for task in ("vanilla", "amodal")
    ]
    groups = [group for file in files if file.is_file() for group in read_rows(file)]
    mixed = [group for group in groups if min(group["rewards"]) < 0.5 < max(group["rewards"])]
    return lot(mixed, 1)[0] if mixed else None


def _controls(figure: Figure | SubFigure, words: Sequence[str]) -> None:
    """A row of drawn buttons."""
    ax = figure.subplots()
    ax.set_axis_off()
    x_pt = 6.0
    for text in words:
        ax.annotate(
            text,
            (0, 0.5),
            (x_pt, 0),
            "axes fraction",
            "offset points",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": GRID},
        )
        x_pt += text_width_pt(text, 8) + 14


def _down_up(values: Sequence[Estimate]) -> np.ndarray:
    """Lengths of error bars in percent, 2 x N; none where there is no interval."""
    return (
        100
        * np.array(
            [
                [
                    v.mean - (v.ci95[0] if v.ci95 else v.mean),
                    (v.ci95[1] if v.ci95 else v.mean) - v.mean,
                ]
                for v in values
            ]
        )
        .reshape(-1, 2)
        .clip(min=0)
        .T
    )


def _say(ax: Axes, paragraphs: Sequence[tuple[str, str, int, float, str]]) -> None:
    """Paragraphs (text, colour, letters a line, size in points, weight) from the top down."""
    ax.set_axis_off()
    down_pt = 2.0
    for text, colour, letters, size, weight in paragraphs:
        lines = textwrap.wrap(text, letters)
        ax.annotate(
            "\n".join(lines),
            (0.02, 1),
            (0, -down_pt),
            "axes fraction",
            "offset points",
            va="top",
            color=colour,
            fontsize=size,
            fontweight=weight,
            linespacing=1.2,
        )
        down_pt += (1.25 * len(lines) + 0.6) * size


def _legend(figure: Figure, models: Sequence[str]) -> None:
    ax = figure.add_subplot(label="legend")
    ax.set_axis_off()
    handles = []
    for style in (GROUND_TRUTH, *map(look, models)):
        swatch(ax, 0, 0, style)
        handles.append(ax.lines[-1])
    ax.remove()
    figure.legend(
        handles,
        [style.label for style in (GROUND_TRUTH, *map(look, models))],
        loc="outside lower center",
        ncols=len(handles),
        handlelength=3,
    )


FIGURES: dict[str, tuple[str, Callable[[Material], tuple[Figure, str]]]] = {
    "overview": ("EGM at a glance", overview),
    "fig5": ("Fig. 1, 5: accuracy against latency", fig5),
    "fig2": ("Fig. 2: failures by cause", fig2),
    "fig2_examples": ("Fig. 2: a failure of each cause", fig2_examples),
    "fig3": ("Fig. 3: curated reasoning", fig3),
    "fig4": ("Fig. 4: what EGM solves", fig4),
    "fig6": ("Fig. 6: amodal", fig6),
    "fig12": ("Fig. 12: where it still fails", fig12),
    "training": ("Training curves", training),
    "iou": ("IoU before and after", iou_histogram),
    "solved": ("Table 11 drawn: solved share", solved_share),
    "lookalikes": ("Accuracy by look-alikes and kind of prompt", lookalikes),
    "viewer": ("The trace viewer", viewer),
}


def build_figures(
    run_roots: Sequence[Path],
    out_dir: Path,
    *,
    root: Path | None = None,
    rule: str = "egm",
    parameters: Mapping[str, int] | None = None,
    only: Sequence[str] | None = None,
) -> list[Drawn]:
    """Writes every figure (or those in `only`) to out_dir as PNG and PDF, and figures.json; returns
    what was made.

    run_roots: the runs of one profile, one a seed. root, parameters: data root, and number of
    parameters by model;
    default: as the profile of the runs says. A figure whose files are absent is not made (an older
    one is removed).
    """
    results, out_dir = Results(run_roots, rule), Path(out_dir)
    if unknown := set(only or ()) - set(FIGURES):
        raise ValueError(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    material = Material(results, root or data_root(results), parameters or _parameters(results))
    drawn = []
    for name, (title, build) in FIGURES.items():
        if only is not None and name not in only:
            continue
        files = [out_dir / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        try:
            with styled():
                figure, caption = build(material)
            for file in files:
                save(figure, file)
            drawn.append(Drawn(name, title, caption, files=tuple(file.name for file in files)))
        except NotRun as reason:
            for file in files:
                file.unlink(missing_ok=True)
            drawn.append(Drawn(name, title, not_run=str(reason)))
    if only is None:
        with atomic_open(out_dir / "figures.json") as file:
            file.write(
                json.dumps([vars(each) for each in drawn], indent=1, ensure_ascii=False) + "\n"
            )
    return drawn


def data_root(results: Results) -> Path:
    """Where the pictures of the runs' profile lie; the current folder for a profile that is no
    more.
    """
    try:
        return load_profile(results.profile).data.path
    except ProfileError:
        return Path(".")


def _parameters(results: Results) -> dict[str, int]:
    """Parameters by model, counted in the headers of the profile's safetensors files; none where
    they are not here.
    """
    from safetensors import safe_open

    try:
        models = load_profile(results.profile).models
    except ProfileError:
        return {}
    counts = {}
    for name, location in (("small", models.small.location), ("large", models.large.location)):
        total = 0
        for file in sorted(Path(location).glob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:
                total += sum(
                    int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys()
                )  # noqa: SIM118
        if total:
            counts[name] = total
    return {
        model: counts[size]
        for model in results.models
        if (size := model.partition("-")[0]) in counts
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.figures", description="Rebuild the figures of a profile."
    )
    parser.add_argument("--profile", default="mini")
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES)
    )
    args = parser.parse_args(argv)
    try:
        profile = load_profile(args.profile)
        runs = [Run(profile, seed) for seed in profile.seeds]
        out_dir = runs[0].figures
        drawn = build_figures(
            [run.root for run in runs], out_dir, rule=profile.evaluation.rule, only=args.only
        )
    except (ProfileError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for each in drawn:
        print(
            f"{each.name}: not run, {each.not_run}"
            if each.not_run
            else f"{out_dir / each.name}.png"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
