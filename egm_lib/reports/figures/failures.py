"""Figures of failures and their causes."""

import textwrap

import numpy as np
from matplotlib.figure import Figure

from egm_lib.evaluation.results import paper
from egm_lib.evaluation.statistics import sample_fixed
from egm_lib.reports.figures.material import (
    DRAWS,
    LARGE,
    SMALL,
    Material,
    NotRun,
)
from egm_lib.reports.figures.pieces import down_up, draw_legend
from egm_lib.reports.tables.paper import cause_shares, counted_failures
from egm_lib.viewer.drawing import draw_image
from egm_lib.viewer.palette import INK, new_figure, style_of


def fig2(material: Material) -> tuple[Figure, str]:
    """Shares of the causes, the paper's and ours."""
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
    centres = np.arange(len(causes))[::-1].astype(float)
    height = 0.8 / bars
    ax.barh(
        centres + 0.4 - height / 2,
        [row["values"][0] for row in source["rows"]],
        height,
        color="#CFCFCF",
        label="paper: InternVL-3-8B, judged by GPT-4",
    )
    for number, (model, by_cause) in enumerate(shares.items(), 1):
        y = centres + 0.4 - height * (number + 0.5)
        values = [by_cause[cause] for cause in causes]
        style = style_of(model)
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
            xerr=down_up(values),
            fmt="none",
            color=INK,
            linewidth=0.9,
        )
    ax.set(
        yticks=centres,
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
        f"Causes of failure by the majority of the judges ({judges}). Bars: 95 % intervals. Grey: "
        "the paper.",
    )


def fig2_examples(material: Material) -> tuple[Figure, str]:
    """One failure of the small base for each cause."""
    causes = material.results.majority_causes(SMALL)
    seed = material.results.seeds[0]
    cause_of = {row.sample_id: row.cause for row in causes.itertuples() if row.seed == seed}
    if not cause_of:
        raise NotRun(f"no judged failures of {SMALL} (notebook 01)")
    failed = [sample for sample in material.of("vanilla") if sample.failed(SMALL)]
    examples = []
    for cause in (row["name"] for row in paper("table1")["rows"]):
        samples = [sample for sample in failed if cause_of.get(sample.sample["sample_id"]) == cause]
        examples += [(cause, sample) for sample in sample_fixed(samples, 1)]
    if not examples:
        raise NotRun("the judged failures have no prediction rows")
    figure = new_figure(2.2 * max(len(examples), 2), 3.2)
    axes = figure.subplots(1, len(examples), squeeze=False)[0]
    for ax, (cause, sample) in zip(axes, examples, strict=True):
        boxes = [(sample.answers[SMALL].box, style_of(SMALL))]
        draw_image(ax, sample.sample, boxes, material.root)
        ax.set_title(cause, fontsize=8)
        ax.text(
            0,
            -0.03,
            textwrap.fill(f"“{sample.sample['expression']}”", 32),
            va="top",
            fontsize=7.5,
            transform=ax.transAxes,
        )
    draw_legend(figure, [SMALL])
    return figure, "One failure of the small base for each cause, drawn at random."
