"""Pieces that several figures share."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egm_lib.evaluation.statistics import Estimate
from egm_lib.viewer.drawing import swatch
from egm_lib.viewer.palette import GROUND_TRUTH, style_of


def draw_errors(
    ax: Axes, x: float, x_ci: Sequence[float] | None, value: Estimate, colour: str
) -> None:
    """Error bars of a point: along x where there is an interval, and of an accuracy along y."""
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
    """The size in a published model's name: 235 of "Qwen3-VL-235B-A22B-Instruct"."""
    sizes = (part[:-1] for part in name.split("-") if part.endswith("B"))
    return next(float(size) for size in sizes if size.isdigit())


def millions(size: int | None) -> str:
    """A number of parameters for a legend; nothing where it is unknown."""
    if not size:
        return ""
    return f", {size / 1e9:.1f} B" if size >= 1e9 else f", {size / 1e6:.1f} M"


def down_up(values: Sequence[Estimate]) -> np.ndarray:
    """Lengths of error bars in percent, 2 x N; zero where there is no interval."""
    lengths_N_2 = np.zeros((len(values), 2))
    for row, value in zip(lengths_N_2, values, strict=True):
        if value.ci95:
            row[:] = value.mean - value.ci95[0], value.ci95[1] - value.mean
    return 100 * lengths_N_2.clip(min=0).T


def say(ax: Axes, paragraphs: Sequence[tuple[str, str, int, float, str]]) -> None:
    """Writes paragraphs from the top down: (text, colour, letters a line, size in pt, weight)."""
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
    """A legend of boxes below a figure: the ground truth and the models."""
    ax = figure.add_subplot(label="legend")
    ax.set_axis_off()
    handles = []
    for style in (GROUND_TRUTH, *map(style_of, models)):
        swatch(ax, 0, 0, style)
        handles.append(ax.lines[-1])
    ax.remove()
    figure.legend(
        handles,
        [style.label for style in (GROUND_TRUTH, *map(style_of, models))],
        loc="outside lower center",
        ncols=len(handles),
        handlelength=3,
    )
