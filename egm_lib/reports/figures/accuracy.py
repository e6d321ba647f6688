"""Figures of accuracy: against latency, by IoU, by look-alikes."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egm_lib.evaluation.results import paper
from egm_lib.evaluation.statistics import estimate, pair
from egm_lib.reports.figures.material import DRAWS, EGM, LARGE, SMALL, Material, NotRun
from egm_lib.reports.figures.pieces import billions, down_up, draw_errors, millions
from egm_lib.reports.tables.beyond_paper import latency_stats
from egm_lib.reports.tables.cells import decimal_text
from egm_lib.viewer.palette import FAINT, INK, SOLVED, new_figure, style_of


def fig5(material: Material) -> tuple[Figure, str]:
    """Accuracy against latency, the paper's models and the run's."""
    results = material.results
    points = {
        model: (latency, value)
        for model in results.models
        if (latency := latency_stats(results, model))
        and (value := estimate(results.of(model), over_splits=True, draws=DRAWS))
    }
    if not points:
        raise NotRun(
            "no latency rows beside predictions (python -m egm_lib.inference.predict --latency)"
        )
    figure = new_figure(9.2, 4.0)
    left, right = figure.subplots(1, 2)
    _published_latency(left)
    sizes = [material.parameters.get(model) for model in points]
    largest = max((size for size in sizes if size), default=None)
    for (model, (latency, value)), size in zip(points.items(), sizes, strict=True):
        style = style_of(model)
        area = 220 * size / largest if size else 60
        draw_errors(right, latency["mean"], latency["ci95"], value, style.colour)
        right.scatter(
            latency["mean"],
            100 * value.mean,
            s=max(area, 18),
            color=style.colour,
            marker=style.marker,
            edgecolor="white",
            zorder=3,
            label=f"{style.label}{millions(size)}",
        )
    right.set(
        title="This run", xlabel="latency of one request, ms", ylabel="accuracy at IoU > 0.5, %"
    )
    right.margins(0.18)
    right.grid(True)
    _legend_below(right, ncols=3, markerscale=0.6)
    note = (
        "area proportional to the number of parameters"
        if largest
        else "parameters not recorded: equal areas"
    )
    caption = (
        f"Accuracy against latency, the paper's models and ours ({note}; bars: 95 % intervals). "
    )
    return (
        figure,
        caption + "The panels were measured on different machines: compare only within a panel.",
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
        members = [
            row for row in rows if row["name"].startswith(head) and row["name"].endswith(tail)
        ]
        if not members:
            continue
        x, y = zip(*(row["values"] for row in members), strict=True)
        sizes = [billions(row["name"]) for row in members]
        ax.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        areas = [14 + 22 * size**0.5 for size in sizes]
        ax.scatter(
            x, y, s=areas, color=colour, marker=marker, edgecolor="white", zorder=3, label=family
        )
        for row, size, area in zip(members, sizes, areas, strict=True):
            off = area**0.5 / 2 + 1.5  # pt: clear of the marker, on a side without a line
            side = {"xytext": (-off, off), "ha": "right", "va": "center"}
            if row is members[-1]:
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
    _legend_below(ax, ncols=2, markerscale=0.7)


def _legend_below(ax: Axes, *, ncols: int, markerscale: float) -> None:
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=ncols,
        fontsize=7.5,
        markerscale=markerscale,
        columnspacing=1,
    )


def iou_histogram(material: Material) -> tuple[Figure, str]:
    """IoU of the small base and of EGM."""
    tasks = [task for task in ("vanilla", "amodal") if not material.results.of(EGM, task).empty]
    if not tasks:
        raise NotRun(f"no predictions of {EGM}")
    figure = new_figure(4.4 * len(tasks), 3.0)
    bins = np.linspace(0, 1, 21)
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for model in (SMALL, EGM):
            rows, style = material.needed(model, task), style_of(model)
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
        "IoU before (small base) and after (small + EGM). Successes lie right of the dotted line.",
    )


def solved_share(material: Material) -> tuple[Figure, str]:
    """How many of the base's failures EGM solves, by the base's IoU."""
    both = _paired(material)
    failed = both[~both["a"].astype(bool)]
    if failed.empty:
        raise NotRun("the small base has no failures")
    edges = [-1e-9, 0, 0.1, 0.2, 0.3, 0.4, 0.5]
    labels = ["0", "to 0.1", "0.1-0.2", "0.2-0.3", "0.3-0.4", "0.4-0.5"]
    bins = pd.cut(failed["base_iou"], edges, labels=labels)
    figure = new_figure(6.4, 3.1)
    ax = figure.subplots()
    groups = [(label, failed[bins == label]) for label in labels]
    for x, (_, rows) in enumerate(groups):
        value = estimate(rows, "b", draws=DRAWS)
        if value is None:
            ax.text(x, 1, "none", ha="center", fontsize=7.5, color=FAINT)
            continue
        ax.bar(x, 100 * value.mean, 0.72, color=SOLVED, alpha=0.85)
        ax.errorbar(x, 100 * value.mean, down_up([value]), fmt="none", color=INK, linewidth=0.9)
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
        title="How many of the base's failures are solved",
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
    """Accuracy by the number of look-alikes and by the kind of prompt."""
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
            "no predictions, or samples that state neither look-alikes nor the kind of prompt"
        )
    figure = new_figure(9.2, 3.5)
    axes = figure.subplots(1, len(strata), squeeze=False, width_ratios=[1, 1.5][: len(strata)])[0]
    for ax, stratum in zip(axes, strata, strict=True):
        values = sorted(known[stratum].dropna().unique())
        for number, model in enumerate(models):
            style, rows = style_of(model), known[known["model"] == model]
            shift = (number - (len(models) - 1) / 2) * 0.12
            found = [
                (index + shift, value)
                for index, key in enumerate(values)
                if (value := estimate(rows[rows[stratum] == key], draws=DRAWS))
            ]
            x = [position for position, _ in found]
            joined = (0, style.dash) if style.dash else "-"
            ax.errorbar(
                x,
                [100 * value.mean for _, value in found],
                down_up([value for _, value in found]),
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
            ylim=(0, 105),
            title={"num_lookalikes": "by look-alikes", "prompt_kind": "by kind of prompt"}[stratum],
        )
        if stratum == "num_lookalikes":
            ax.set_xlabel("number of look-alikes")
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
        "Accuracy on the vanilla splits by what makes a prompt hard. Bars: 95 % intervals, "
        "clustered on images.",
    )
