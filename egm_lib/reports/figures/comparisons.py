"""The wide tables as figures: differences as a forest plot, accuracy by split as a dot plot."""

import numpy as np
from matplotlib.figure import Figure

from egm_lib.data import AMODAL_SPLITS, EVAL_SPLITS, split_id
from egm_lib.evaluation.hypotheses import MARGIN
from egm_lib.evaluation.scoring import split_keys
from egm_lib.evaluation.statistics import estimate
from egm_lib.reports.figures.curves import TASKS
from egm_lib.reports.figures.material import DRAWS, EGM, LARGE, SMALL, Material, NotRun
from egm_lib.reports.figures.pieces import down_up
from egm_lib.reports.tables.beyond_paper import differences
from egm_lib.reports.tables.cells import Number, p_text, percent
from egm_lib.reports.tables.evidence import answered
from egm_lib.viewer.palette import FAINT, INK, new_figure, style_of

DATASETS = {  # as the paper writes them
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCO+",
    "refcocog": "RefCOCOg",
    "coco_amodal": "COCO-Amodal",
}
SPLIT_MODELS = (SMALL, "small-sft", EGM, "small-direct-control", "small-sft-control", LARGE)


def forest(material: Material) -> tuple[Figure, str]:
    """Paired differences between models with their intervals."""
    tests = [row for row in differences(material.results) if row[3] is not None]
    if not tests:
        raise NotRun("no two models to compare")
    figure = new_figure(8.2, 0.8 + 0.26 * len(tests))
    ax = figure.subplots()
    heights = np.arange(len(tests))[::-1]
    for y, (_, _, task, test, adjusted_p) in zip(heights, tests, strict=True):
        points = percent(test)
        decided = test.ci95 is not None and (test.ci95[0] > 0) == (test.ci95[1] > 0)
        ax.errorbar(
            points.value,
            y,
            xerr=down_up([test]),
            fmt="o" if task == "vanilla" else "s",
            color=TASKS[task][0],
            # Hollow: the interval includes zero.
            markerfacecolor=TASKS[task][0] if decided else "white",
            markersize=5,
            elinewidth=1.2,
        )
        text = f"{Number(points.value, points.ci95, signed=True)}"
        if adjusted_p is not None:
            p = p_text(adjusted_p)
            text += f"   p {p}" if p.startswith("<") else f"   p = {p}"
        written = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
        ax.text(1.02, y, text, **written)
    ax.axvline(0, color=FAINT, linewidth=0.9)
    labels = [f"{style_of(a).label} − {style_of(b).label}" for a, b, *_ in tests]
    ax.set_yticks(heights, labels, fontsize=8)
    ax.tick_params(axis="y", length=0)
    first_amodal = next((i for i, test in enumerate(tests) if test[2] == "amodal"), None)
    if first_amodal:
        ax.axhline(heights[first_amodal] + 0.5, color=FAINT, linewidth=0.5, linestyle=":")
    for task, marker in (("vanilla", "o"), ("amodal", "s")):
        ax.plot([], [], marker, color=TASKS[task][0], label=task)
    ax.set_xlabel("difference in accuracy at IoU > 0.5, points")
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return (
        figure,
        "Differences paired on samples, mean over the splits, with 95 % intervals; p after Holm's "
        "correction over all of them. Hollow: the interval includes zero.",
    )


ANSWERS = {"holds": "#009E73", "does not hold": "#D55E00", "not told apart": FAINT}


def hypotheses(material: Material) -> tuple[Figure, str]:
    """The registered hypotheses, each with its difference, its interval and its answer."""
    found = [row for row in answered(material.results) if row.difference is not None]
    if not found:
        raise NotRun("the registered experiment (docs/protocol.md)")
    figure = new_figure(9.2, 1.0 + 0.3 * len(found))
    ax = figure.subplots()
    heights = np.arange(len(found))[::-1]
    ax.axvspan(-100 * MARGIN, 100 * MARGIN, color=FAINT, alpha=0.15, linewidth=0)
    ax.axvline(0, color=FAINT, linewidth=0.9)
    for y, row in zip(heights, found, strict=True):
        points, marks = percent(row.difference), {"markersize": 5, "elinewidth": 1.2}
        colour = ANSWERS.get(row.status, FAINT)
        ax.errorbar(points.value, y, xerr=down_up([row.difference]), fmt="o", color=colour, **marks)
        written = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
        ax.text(1.02, y, f"{points}   {row.status}", color=colour, **written)
    labels = [
        f"{row.hypothesis.name}  {row.hypothesis.says}"
        + (", amodal" if row.hypothesis.task == "amodal" else "")
        for row in found
    ]
    ax.set_yticks(heights, labels, fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("difference in accuracy at IoU > 0.5, points")
    ax.grid(True, axis="x")
    return (
        figure,
        "The hypotheses of the protocol with their 95 % intervals over images and seeds. Shaded: "
        "the margin, within which a difference counts as none.",
    )


def splits(material: Material) -> tuple[Figure, str]:
    """Accuracy of each model on each split, with intervals."""
    scored = material.results.scored
    keys = split_keys(scored)
    models = [model for model in SPLIT_MODELS if model in material.results.models]
    answered_splits = [
        pair for pair in (*EVAL_SPLITS, *AMODAL_SPLITS) if (keys == split_id(*pair)).any()
    ]
    names = [split_id(*pair) for pair in answered_splits]
    if not models or not names:
        raise NotRun("no predictions on the evaluation splits")
    figure = new_figure(9.2, 3.6)
    ax = figure.subplots()
    for number, model in enumerate(models):
        style, rows = style_of(model), scored[scored["model"] == model]
        shift = (number - (len(models) - 1) / 2) * 0.12
        found = [
            (index + shift, value)
            for index, name in enumerate(names)
            if (value := estimate(rows[keys[rows.index] == name], draws=DRAWS))
        ]
        if found:
            x, values = zip(*found, strict=True)
            y = [100 * value.mean for value in values]
            marks = {"color": style.colour, "marker": style.marker, "markersize": 5}
            ax.errorbar(x, y, down_up(values), fmt="none", elinewidth=1, color=style.colour)
            ax.plot(x, y, linestyle="none", label=style.label, **marks)
    for edge in np.arange(len(names) - 1) + 0.5:
        ax.axvline(edge, color=FAINT, linewidth=0.4, alpha=0.5)
    shown = [f"{DATASETS[dataset]} {split}" for dataset, split in answered_splits]
    ax.set_xticks(range(len(names)), shown, rotation=30, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.set_ylabel("accuracy at IoU > 0.5, %")
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(True, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    caption = "Accuracy by split (Tables 4 and 5). Bars: 95 % intervals, clustered on images."
    return figure, caption
