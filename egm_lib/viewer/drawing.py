"""Boxes and steps on images with matplotlib: for figures, exports and the viewer's still image."""

import textwrap
from collections.abc import Mapping, Sequence
from math import dist
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox, BboxTransformTo

from egm_lib.boxes import Box
from egm_lib.viewer.comparison import Comparison, ScoredAnswer, plain_box, reasoning_and_answer
from egm_lib.viewer.page import enlarged, image_of, steps_of, tint
from egm_lib.viewer.palette import (
    FAILED,
    FAINT,
    FAULT,
    GROUND_TRUTH,
    INK,
    SOLVED,
    TINTS,
    Look,
    new_figure,
    style_of,
    styled,
)
from egm_lib.viewer.steps import Step, numbered

LINE_IN = 0.175  # height of a line of text
GROUP_COLUMNS = 8
STROKE_SHARE = 0.007  # width of a box's stroke, as a share of the drawn image's shorter side
STROKE_PT = (0.9, 1.4)  # and its limits
GROUND_TRUTH_WIDTH = 1.9  # strokes: it shows around an answer that is right
HALO_WIDTH = 1.0  # strokes: white beyond a box, so that it shows on any image
SHARED_LABEL = 0.05  # of the image's longer side: places so close have one label for their steps

Steps = Sequence[tuple[Sequence[Step], Look]]


class OutsideBox(Patch):
    """The outline of a box (xyxy, data coordinates), drawn outside it, so that it hides nothing.

    width: in strokes, whose thickness follows the size of the drawn image.
    """

    def __init__(self, box: Box, width: float, **style):
        super().__init__(fill=False, joinstyle="miter", **style)
        self.box, self.width = box, width

    def get_path(self) -> Outline:
        return Outline.unit_rectangle()

    def get_transform(self):
        x1, y1, x2, y2 = self.box
        corners = self.axes.transData.transform([(x1, y1), (x2, y2)])
        (left, bottom), (right, top) = corners.min(axis=0), corners.max(axis=0)
        half_px = self.get_linewidth() / 2 * self.figure.dpi / 72
        return BboxTransformTo(
            Bbox.from_extents(left - half_px, bottom - half_px, right + half_px, top + half_px)
        )

    def draw(self, renderer):
        drawn = self.axes.bbox
        side_pt = min(drawn.width, drawn.height) * 72 / self.figure.dpi
        low, high = STROKE_PT
        self.set_linewidth(self.width * min(max(STROKE_SHARE * side_pt, low), high))
        super().draw(renderer)


def draw_box(ax: Axes, box: Box, style: Look, width: float = 1.0, layer: int = 4) -> None:
    """A box (xyxy px) with its white halo beneath all boxes; width: in strokes."""
    ax.add_patch(OutsideBox(box, width + HALO_WIDTH, edgecolor="white", alpha=0.85, zorder=2))
    line = (0, style.dash) if style.dash else "solid"
    ax.add_patch(OutsideBox(box, width, edgecolor=style.colour, linestyle=line, zorder=layer))


def draw_hidden(ax: Axes, amodal: Box, modal: Box) -> None:
    """Hatches what the amodal box holds beyond the visible (modal) one, lightly; xyxy px."""

    def ring(box: Box) -> list[tuple[float, float]]:
        x1, y1, x2, y2 = box
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]

    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    hidden = Outline(ring(amodal) + ring(modal)[::-1], codes * 2)
    for colour, width in (("white", 1.1), (GROUND_TRUTH.colour, 0.4)):
        patch = PathPatch(
            hidden, facecolor="none", edgecolor=colour, alpha=0.65, hatch="///", linewidth=0
        )
        patch.set_hatch_linewidth(width)
        ax.add_patch(patch)
    x1, y1, x2, y2 = modal
    outline = {"edgecolor": GROUND_TRUTH.colour, "linewidth": 0.6, "linestyle": (0, (1, 1.5))}
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, alpha=0.8, **outline))


def draw_steps(ax: Axes, steps: Sequence[Step], style: Look, near_px: float) -> None:
    """The places that a trace names: dots with their numbers, joined in order by a thin line.

    Steps within near_px of one another share a label, such as "1,3": two labels there would cover
    each other. A box that the trace names is outlined with dots; a step with a fault has a ring and
    a "!".
    """
    if not steps:
        return
    halo = [withStroke(linewidth=2.0, foreground="white", alpha=0.85)]
    x, y = zip(*(step.point for step in steps), strict=True)
    shared = {"color": style.colour, "clip_on": True}
    ax.plot(x, y, linewidth=0.7, zorder=6, path_effects=halo, **shared)
    ax.scatter(x, y, s=5, zorder=7, edgecolor="white", linewidth=0.4, **shared)
    labels: dict[tuple[float, float], list[str]] = {}
    for number, step in enumerate(steps, start=1):
        if step.kind == "box":
            x1, y1, x2, y2 = step.box
            dotted = {"edgecolor": style.colour, "linewidth": 0.6, "linestyle": (0, (1, 2))}
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, zorder=6, **dotted))
        if step.fault:
            ring = {"s": 36, "facecolor": "none", "edgecolor": FAULT, "linewidth": 1.0}
            ax.scatter(*step.point, zorder=7, **ring)
        spot = next((at for at in labels if dist(at, step.point) <= near_px), step.point)
        labels.setdefault(spot, []).append(f"{number}!" if step.fault else str(number))
    for spot, numbers in labels.items():
        text = ",".join(numbers)
        ax.annotate(
            text,
            spot,
            (3, 2.5),
            textcoords="offset points",
            fontsize=6,
            fontweight="bold",
            color=FAULT if "!" in text else style.colour,
            path_effects=halo,
            zorder=8,
        )


def draw_image(
    ax: Axes,
    sample: Mapping,
    answers: Sequence[tuple[Box | None, Look]],
    root: str | Path,
    *,
    steps: Steps = (),
) -> None:
    """The image, the ground truth (hatched where hidden), each answer's box, and steps of traces.

    The view grows to hold boxes that leave the image, up to twice its size.
    """
    ax.set_axis_off()
    gt, modal = plain_box(sample.get("gt_box")), plain_box(sample.get("modal_box"))
    try:
        image = image_of(sample, root)
        width, height = sample.get("width") or image.width, sample.get("height") or image.height
        ax.imshow(enlarged(image), extent=(0, width, height, 0), interpolation="antialiased")
    except (OSError, ValueError) as problem:
        width, height = sample.get("width") or 1, sample.get("height") or 1
        message = textwrap.fill(f"no image: {problem}", 36)
        centred = {"ha": "center", "va": "center", "transform": ax.transAxes}
        # A small axes must not grow with its message
        ax.text(0.5, 0.5, message, color=FAINT, fontsize=7, in_layout=False, **centred)
    if gt is not None:
        if modal is not None:
            draw_hidden(ax, tuple(gt), tuple(modal))
        draw_box(ax, tuple(gt), GROUND_TRUTH, GROUND_TRUTH_WIDTH, 3)
    shown = [(box, style) for box, style in answers if box is not None]
    for box, style in shown:  # dashes above solid lines: two equal answers both show
        draw_box(ax, box, style, layer=5 if style.dash else 4)
    for found, style in steps:
        draw_steps(ax, found, style, SHARED_LABEL * max(width, height))
    boxes = [box for box, _ in shown] + ([gt] if gt is not None else [])
    pad = 0.02 * max(width, height)
    left, top = (min([0, *(box[side] - pad for box in boxes)]) for side in (0, 1))
    right, bottom = (
        max([size, *(box[side] + pad for box in boxes)]) for side, size in ((2, width), (3, height))
    )
    ax.set_xlim(max(left, -width), min(right, 2 * width))
    ax.set_ylim(min(bottom, 2 * height), max(top, -height))
    ax.set_aspect("equal")


def comparison_figure(
    comparison: Comparison,
    models: Sequence[str],
    root: str | Path,
    *,
    note: str = "",
    group: Mapping | None = None,
    objects: Sequence[Box] | None = None,
    width_in: float = 9.0,
) -> Figure:
    """The viewer's still image and its PNG, SVG and PDF export; group: as `view_of` makes it."""
    blocks = _blocks(comparison, models, objects)
    heights_in = [_height_in(blocks)]
    if group:
        heights_in.append(group_height_in(group, comparison.sample, width_in))
    with styled():
        figure = new_figure(width_in, sum(heights_in))
        parts = figure.subfigures(len(heights_in), 1, height_ratios=heights_in, squeeze=False)[:, 0]
        draw_comparison(parts[0], comparison, models, root, note=note, objects=objects)
        if group:
            draw_group(parts[1], group, comparison.sample, root)
    return figure


def comparison_height_in(
    comparison: Comparison, models: Sequence[str], objects: Sequence[Box] | None = None
) -> float:
    """The height that draw_comparison needs for its text, in inches."""
    return _height_in(_blocks(comparison, models, objects))


# What is written of a model: its look, its answer, its steps, its reasoning in lines.
Block = tuple[Look, ScoredAnswer, list[Step], list[str]]


def _height_in(blocks: Sequence[Block]) -> float:
    return max(3.4, LINE_IN * (4.2 + sum(2.3 + len(lines) for *_, lines in blocks)) + 0.3)


def _blocks(
    comparison: Comparison, models: Sequence[str], objects: Sequence[Box] | None
) -> list[Block]:
    blocks = []
    for index, model in enumerate(models):
        if (answer := comparison.answers.get(model)) is not None:
            reasoning, _ = reasoning_and_answer(answer.row)
            steps = steps_of(answer.row, objects)
            text = numbered(reasoning, steps) if reasoning else "(no reasoning)"
            lines = textwrap.wrap(textwrap.shorten(text, 440, placeholder=" ..."), 62)
            lines += [f"! step {n}: {step.fault}" for n, step in enumerate(steps, 1) if step.fault]
            blocks.append((style_of(model, index), answer, steps, lines))
    return blocks


def draw_comparison(
    figure: Figure | SubFigure,
    comparison: Comparison,
    models: Sequence[str],
    root: str | Path,
    *,
    note: str = "",
    objects: Sequence[Box] | None = None,
) -> None:
    """Left: the image with boxes and steps. Right: the expression and each model's reasoning."""
    sample, blocks = comparison.sample, _blocks(comparison, models, objects)
    left, right = figure.subplots(1, 2, width_ratios=(4.2, 4.8))
    boxes = [(answer.box, style) for style, answer, _, _ in blocks]
    draw_image(left, sample, boxes, root, steps=[(steps, style) for style, _, steps, _ in blocks])
    right.set_axis_off()
    right.set_xlim(0, 1)
    right.set_ylim(_height_in(blocks) / LINE_IN, 0)  # one unit a line of text
    y = 1.0
    for line in textwrap.wrap(f"“{sample.get('expression', '')}”", 50)[:3]:
        right.text(0, y, line, fontsize=11, fontweight="bold", va="center")
        y += 1.3
    facts = [*(sample.get(name) for name in ("dataset", "split", "prompt_kind", "sample_id")), note]
    stated = " · ".join(str(fact) for fact in facts if fact not in (None, ""))
    right.text(0, y, stated, fontsize=7.5, color=FAINT, va="center")
    y += 1.4
    swatch(right, 0, y, GROUND_TRUTH)
    right.text(0.085, y, GROUND_TRUTH.label, va="center")
    if sample.get("modal_box") is not None:
        right.text(0.33, y, "(hatched: hidden part)", va="center", fontsize=8, color=FAINT)
    y += 1.6
    for style, answer, _, lines in blocks:
        swatch(right, 0, y, style)
        right.text(0.085, y, style.label, va="center", fontweight="bold")
        colour = {True: SOLVED, False: FAILED, None: INK}[answer.success]
        verdict = textwrap.shorten(answer.verdict, 44)
        right.text(0.48, y, verdict, va="center", color=colour)
        y += 1.25
        for line in lines:
            if line.startswith("! step"):
                right.text(0.085, y, line, fontsize=8, color=FAULT, va="center")
            else:
                write_tinted(right, 0.085, y, line, 8)
            y += 1
        y += 0.8


def write_tinted(ax: Axes, x: float, y: float, line: str, size_pt: float) -> None:
    """A line of text from (x, y) in data coordinates, with places and look-alikes on a tint."""
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
    """The width of a line of text in the house font, trailing space included."""
    return text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size_pt), ismath=False
    )[0]


def draw_group(
    figure: Figure | SubFigure, group: Mapping, sample: Mapping, root: str | Path
) -> None:
    """The completions of one prompt as small multiples: box, reward r and advantage A.

    group: as `view_of` makes it.
    """
    completions = group["completions"]
    hits, step = sum(completion["success"] for completion in completions), group.get("step")
    title = "GRPO group" if step is None else f"GRPO group at step {step}"
    title += f": {hits} of {len(completions)} completions hit “{sample.get('expression', '')}”"
    figure.suptitle(textwrap.fill(title, 100), x=0.01, ha="left", fontsize=9)
    rows = -(-len(completions) // GROUP_COLUMNS)
    axes = figure.subplots(rows, GROUP_COLUMNS, squeeze=False).ravel()
    for ax in axes[len(completions) :]:
        ax.set_axis_off()
    for ax, completion in zip(axes, completions, strict=False):
        hit = completion["success"]
        style = Look("completion", SOLVED if hit else FAILED, () if hit else (4, 2), "o")
        draw_image(ax, sample, [(completion["box"], style)], root)
        numbers = f"r {completion['reward']:.2f}   A {completion['advantage']:+.2f}"
        ax.set_title(
            numbers.replace("-", "−"),
            loc="center",
            fontsize=7,
            fontweight="normal",
            color=style.colour,
            y=-0.2,
        )


def group_height_in(group: Mapping, sample: Mapping, width_in: float) -> float:
    """The height that draw_group needs, in inches."""
    tall = (sample.get("height") or 1) / (sample.get("width") or 1)
    rows = -(-len(group["completions"]) // GROUP_COLUMNS)
    return 0.6 + rows * (width_in / GROUP_COLUMNS * tall + 0.12)


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
