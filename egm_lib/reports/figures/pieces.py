"""Pieces that several figures share."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egm_lib.evaluation.statistics import Estimate
from egm_lib.viewer.drawing import (
    swatch,
)
from egm_lib.viewer.palette import (
    GROUND_TRUTH,
    look,
)


def draw_errors(ax: Axes, x: float, x_ci, value: Estimate, colour: str) -> None:
    x_error = [[x - x_ci[0]], [x_ci[1] - x]] if x_ci else None
    ax.errorbar(
        x,
        100 * value.mean,
        down_up([value]),
        x_error,
        fmt="none",
        color=colour,
        linewidth=1,
        zorder=2,
    )


def billions(name: str) -> float:
    return next(
        float(part[:-1]) for part in name.split("-") if part.endswith("B") and part[:-1].isdigit()
    )


def millions(size: int | None) -> str:
    return (
        f", {size / 1e9:.1f} B" if size and size >= 1e9 else f", {size / 1e6:.1f} M" if size else ""
    )


def down_up(values: Sequence[Estimate]) -> np.ndarray:
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


def say(ax: Axes, paragraphs: Sequence[tuple[str, str, int, float, str]]) -> None:
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


def draw_legend(figure: Figure, models: Sequence[str]) -> None:
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
