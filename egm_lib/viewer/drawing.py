"""Boxes on images with matplotlib: the same drawing for figures, exports and the viewer's still
image.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.textpath import text_to_path

from egm_lib.boxes import Box
from egm_lib.viewer.comparison import Comparison, ScoredAnswer, plain_box, reasoning_and_answer
from egm_lib.viewer.page import image_of, tint
from egm_lib.viewer.palette import (
    FAILED,
    FAINT,
    GROUND_TRUTH,
    INK,
    SOLVED,
    TINTS,
    Look,
    look,
    new_figure,
    styled,
)

LINE_IN = 0.175  # height of a line of text
GROUP_COLUMNS = 8


def draw_box(ax: Axes, box: Box, style: Look, width: float = 1.3, layer: int = 4) -> None:
    """A box, its white halo beneath all boxes, so that it shows on any image and in grey; box:
    xyxy px.
    """
    x1, y1, x2, y2 = box
    shared = {"xy": (x1, y1), "width": x2 - x1, "height": y2 - y1, "fill": False}
    ax.add_patch(
        Rectangle(**shared, edgecolor="white", linewidth=width + 1.6, alpha=0.85, zorder=2)
    )
    line = (0, style.dash) if style.dash else "solid"
    ax.add_patch(
        Rectangle(**shared, edgecolor=style.colour, linewidth=width, linestyle=line, zorder=layer)
    )


def draw_hidden(ax: Axes, amodal: Box, modal: Box) -> None:
    """Hatches what the amodal box holds beyond the visible (modal) one, and outlines the visible
    one; xyxy px.
    """

    def ring(box: Box) -> list[tuple[float, float]]:
        x1, y1, x2, y2 = box
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]

    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    hidden = Outline(ring(amodal) + ring(modal)[::-1], codes * 2)
    ax.add_patch(
        PathPatch(
            hidden,
            facecolor=(1, 1, 1, 0.35),
            edgecolor=GROUND_TRUTH.colour,
            hatch="////",
            linewidth=0,
        )
    )
    draw_box(ax, modal, Look("visible part", GROUND_TRUTH.colour, (1, 1.5), "s"), 0.8)


def draw_image(
    ax: Axes,
    sample: Mapping,
    answers: Sequence[tuple[Box | None, Look]],
    root: str | Path,
    *,
    stroke_pt: float = 1.3,
) -> None:
    """The image, the ground truth (hatched where hidden) and each answer's box; the view grows to
    boxes outside.

    stroke_pt: width of an answer's stroke.
    """
    ax.set_axis_off()
    gt, modal = plain_box(sample.get("gt_box")), plain_box(sample.get("modal_box"))
    try:
        image = image_of(sample, root)
        width, height = sample.get("width") or image.width, sample.get("height") or image.height
        crisp = max(image.size) <= 256  # the miniature world: pixels, not blur
        ax.imshow(
            image,
            extent=(0, width, height, 0),
            interpolation="nearest" if crisp else "antialiased",
        )
    except (OSError, ValueError) as problem:
        width, height = sample.get("width") or 1, sample.get("height") or 1
        ax.text(
            0.5,
            0.5,
            textwrap.fill(f"no image: {problem}", 36),
            ha="center",
            va="center",
            color=FAINT,
            transform=ax.transAxes,
            fontsize=7,
        )
    if gt is not None:
        if modal is not None:
            draw_hidden(ax, tuple(gt), tuple(modal))
        # Wider than answers: it shows beneath a perfect one
        draw_box(ax, tuple(gt), GROUND_TRUTH, 2.15 * stroke_pt, 3)
    shown = [box for box, _ in answers if box is not None]
    for box, style in answers:
        if box is not None:  # dashes above solid lines: they show where two answers are the same
            draw_box(ax, box, style, stroke_pt, 5 if style.dash else 4)
    boxes = [*shown, *([gt] if gt is not None else [])]
    pad = 0.012 * max(width, height)
    x1, y1 = (min([0, *(box[side] - pad for box in boxes)]) for side in (0, 1))
    x2, y2 = (
        max([size, *(box[side] + pad for box in boxes)]) for side, size in ((2, width), (3, height))
    )
    ax.set_xlim(max(x1, -width), min(x2, 2 * width))
    ax.set_ylim(min(y2, 2 * height), max(y1, -height))
    ax.set_aspect("equal")


def verdict(answer: ScoredAnswer) -> str:
    """One line on an answer: IoU or what is wrong with it."""
    if answer.error:
        return f"error: {answer.error}"
    if answer.box is None:
        return {
            "no_box": "no box",
            "unclosed_reasoning": "cut off while reasoning",
            "malformed": "malformed box",
        }.get(answer.status, answer.status)
    return f"{'hit' if answer.success else 'miss'}, IoU {answer.iou:.2f}"


def comparison_figure(
    comparison: Comparison,
    models: Sequence[str],
    root: str | Path,
    *,
    note: str = "",
    group: Mapping | None = None,
    width_in: float = 9.0,
) -> Figure:
    """The viewer's still image and its PNG, SVG and PDF export; group: as in view_of's
    "group".
    """
    heights_in = [comparison_height_in(comparison, models)]
    if group:
        heights_in.append(group_height_in(group, comparison.sample, width_in))
    with styled():
        figure = new_figure(width_in, sum(heights_in))
        parts = figure.subfigures(len(heights_in), 1, height_ratios=heights_in, squeeze=False)[:, 0]
        draw_comparison(parts[0], comparison, models, root, note=note)
        if group:
            draw_group(parts[1], group, comparison.sample, root)
    return figure


def comparison_height_in(comparison: Comparison, models: Sequence[str]) -> float:
    """The height that draw_comparison needs for its text, in inches."""
    return max(
        3.4,
        LINE_IN * (4.2 + sum(2.3 + len(lines) for _, _, lines in _blocks(comparison, models)))
        + 0.3,
    )


def _blocks(
    comparison: Comparison, models: Sequence[str]
) -> list[tuple[Look, ScoredAnswer, list[str]]]:
    """What is written of each model that answered: its look, its answer and its reasoning in
    lines.
    """
    blocks = []
    for place, model in enumerate(models):
        if (answer := comparison.answers.get(model)) is not None:
            reasoning, _ = reasoning_and_answer(answer.row)
            text = textwrap.shorten(reasoning or "(no reasoning)", 420, placeholder=" ...")
            blocks.append((look(model, place), answer, textwrap.wrap(text, 62)))
    return blocks


def draw_comparison(
    figure: Figure | SubFigure,
    comparison: Comparison,
    models: Sequence[str],
    root: str | Path,
    *,
    note: str = "",
) -> None:
    """Image with boxes at the left; at the right the expression and each model's verdict and
    tinted reasoning.
    """
    sample, blocks = comparison.sample, _blocks(comparison, models)
    left, right = figure.subplots(1, 2, width_ratios=(4.2, 4.8))
    draw_image(left, sample, [(answer.box, style) for style, answer, _ in blocks], root)
    right.set_axis_off()
    right.set_xlim(0, 1)
    right.set_ylim(comparison_height_in(comparison, models) / LINE_IN, 0)  # one unit a line of text
    y = 1.0
    for line in textwrap.wrap(f"“{sample.get('expression', '')}”", 50)[:3]:
        right.text(0, y, line, fontsize=11, fontweight="bold", va="center")
        y += 1.3
    facts = [*(sample.get(name) for name in ("dataset", "split", "prompt_kind", "sample_id")), note]
    right.text(
        0,
        y,
        " · ".join(str(fact) for fact in facts if fact),
        fontsize=7.5,
        color=FAINT,
        va="center",
    )
    y += 1.4
    swatch(right, 0, y, GROUND_TRUTH)
    right.text(0.085, y, GROUND_TRUTH.label, va="center")
    if sample.get("modal_box") is not None:
        right.text(0.33, y, "(hatched: hidden part)", va="center", fontsize=8, color=FAINT)
    y += 1.6
    for style, answer, lines in blocks:
        swatch(right, 0, y, style)
        right.text(0.085, y, style.label, va="center", fontweight="bold")
        colour = SOLVED if answer.success else FAILED
        right.text(0.48, y, textwrap.shorten(verdict(answer), 44), va="center", color=colour)
        y += 1.25
        for line in lines:
            write_tinted(right, 0.085, y, line, 8)
            y += 1
        y += 0.8


def write_tinted(ax: Axes, x: float, y: float, line: str, size_pt: float) -> None:
    """A line of text from (x, y) in data coordinates; phrases that name places and look-alikes on a
    tint.
    """
    along_pt = 0.0
    for text, kind in tint(line):
        box = {"facecolor": TINTS[kind], "edgecolor": "none", "pad": 1.0} if kind else None
        ax.annotate(
            text,
            (x, y),
            (along_pt, 0),
            "data",
            "offset points",
            va="center",
            fontsize=size_pt,
            color=INK,
            bbox=box,
            zorder=3 if kind else 4,
            annotation_clip=False,
        )
        along_pt += text_width_pt(text, size_pt)


def text_width_pt(text: str, size_pt: float) -> float:
    """How wide a line of text is in the house font, its last space counted."""
    return text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size_pt), ismath=False
    )[0]


def draw_group(
    figure: Figure | SubFigure, group: Mapping, sample: Mapping, root: str | Path
) -> None:
    """The completions of one prompt as small multiples: box, reward and advantage; group: as in
    view_of's "group".
    """
    completions = group["completions"]
    hits, step = sum(each["success"] for each in completions), group.get("step")
    title = "GRPO group" if step is None else f"GRPO group at step {step}"
    title += f": “{sample.get('expression', '')}”; {len(completions)} completions, {hits} hit"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    axes = figure.subplots(
        -(-len(completions) // GROUP_COLUMNS), GROUP_COLUMNS, squeeze=False
    ).ravel()
    for ax in axes[len(completions) :]:
        ax.set_axis_off()
    for ax, each in zip(axes, completions, strict=False):
        hit = each["success"]
        style = Look("completion", SOLVED if hit else FAILED, () if hit else (4, 2), "o")
        draw_image(ax, sample, [(each["box"], style)], root, stroke_pt=0.8)
        ax.set_title(
            f"r {each['reward']:.2f}   A {each['advantage']:+.2f}".replace("-", "−"),
            loc="center",
            fontsize=7,
            fontweight="normal",
            color=style.colour,
            y=-0.2,
        )


def group_height_in(group: Mapping, sample: Mapping, width_in: float) -> float:
    """The height that draw_group needs, in inches."""
    tall = (sample.get("height") or 1) / (sample.get("width") or 1)
    return 0.45 + -(-len(group["completions"]) // GROUP_COLUMNS) * (
        width_in / GROUP_COLUMNS * tall + 0.12
    )


def swatch(ax: Axes, x: float, y: float, style: Look) -> None:
    """A short stroke in a model's colour and dash."""
    ax.plot(
        [x, x + 0.072],
        [y, y],
        color=style.colour,
        linewidth=2,
        dashes=style.dash or (None, None),
        clip_on=False,
    )
