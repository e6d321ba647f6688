"""Figures that show samples with their answers."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure, SubFigure

from egm_lib.evaluation.statistics import estimate, sample_fixed
from egm_lib.reports.curated import example_traces
from egm_lib.reports.figures.material import (
    DRAWS,
    EGM,
    LARGE,
    SMALL,
    Material,
    NotRun,
    outcome_title,
)
from egm_lib.reports.figures.pieces import down_up, draw_legend, say
from egm_lib.reports.tables.cells import decimal_text
from egm_lib.training.groups import read_groups
from egm_lib.viewer.comparison import Comparison, reasoning_and_answer
from egm_lib.viewer.drawing import (
    comparison_height_in,
    draw_comparison,
    draw_group,
    draw_image,
    group_height_in,
    text_width_pt,
)
from egm_lib.viewer.page import steps_of, view_of
from egm_lib.viewer.palette import (
    FAILED,
    FAINT,
    FAULT,
    GRID,
    INK,
    SOLVED,
    Look,
    new_figure,
    style_of,
)
from egm_lib.viewer.steps import numbered

TEACHER = Look("teacher", "#7B3294", (), "o")

# One row of an example: how it is headed, and the sample.
Example = tuple[str, Comparison]


def fig3(material: Material) -> tuple[Figure, str]:
    """Curated traces, two of each task, with the places that they name."""
    rows = [
        (task, row)
        for task in ("vanilla", "amodal")
        for row in example_traces(material.results.roots[0], task)
    ]
    if not rows:
        raise NotRun("no curated traces (notebooks 02 and 03)")
    lines = (len(rows) + 1) // 2
    figure = new_figure(8.6, 0.2 + 2.15 * lines)
    axes = figure.subplots(lines, 4, width_ratios=(1, 1.15, 1, 1.15), squeeze=False).ravel()
    for ax in axes[2 * len(rows) :]:
        ax.set_axis_off()
    for (task, row), first, text in zip(rows, axes[::2], axes[1::2], strict=False):
        steps = steps_of(row, material.objects(row))
        draw_image(first, row, [], material.root, steps=[(steps, TEACHER)])
        first.set_title(task, fontsize=8, color=FAINT, fontweight="normal")
        say(
            text,
            [
                (f"“{row['expression']}”", INK, 34, 8.5, "bold"),
                (numbered(row["reasoning"], steps), INK, 36, 7.5, "normal"),
            ],
        )
    return (
        figure,
        "Curated reasoning: the target's box (hatched where hidden) and the teacher's trace. The "
        "places that the trace names are numbered in order.",
    )


def _side_by_side(
    material: Material, task: str, wanted: Sequence[tuple[str, int]]
) -> tuple[Figure, str]:
    """The small base beside EGM; wanted: outcomes, and how many samples of each."""
    answered = [sample for sample in material.of(task) if {SMALL, EGM} <= sample.answers.keys()]
    if not answered:
        raise NotRun(f"no {task} samples that both {SMALL} and {EGM} answered")
    examples: list[Example] = []
    for outcome, count in wanted:
        samples = material.with_outcome(task, outcome)
        heading = f"{outcome_title(outcome)} ({len(samples)} of {len(answered)})"
        examples += [(heading, sample) for sample in sample_fixed(samples, count)]
    if not examples:
        raise NotRun(f"no {task} sample has an outcome that this figure shows")
    figure = new_figure(9.0, 2.35 * len(examples))
    axes = figure.subplots(len(examples), 3, width_ratios=(1, 1, 1.7), squeeze=False)
    for (first, second, text), (heading, sample) in zip(axes, examples, strict=True):
        for ax, model in ((first, SMALL), (second, EGM)):
            answer, style = sample.answers[model], style_of(model)
            steps = [(steps_of(answer.row, material.objects(answer.row)), style)]
            draw_image(ax, sample.sample, [(answer.box, style)], material.root, steps=steps)
            ax.set_title(
                f"{style.label}: {textwrap.shorten(answer.verdict, 34)}",
                fontsize=8,
                color=SOLVED if answer.success else FAILED,
            )
        say(
            text,
            [
                (heading, FAINT, 60, 7.5, "normal"),
                (f"“{sample.sample['expression']}”", INK, 46, 9, "bold"),
                *_reasoning(material, sample.answers[EGM].row, 520, 56, 7.5),
            ],
        )
    draw_legend(figure, [SMALL, EGM])
    kinds = "; ".join(dict.fromkeys(heading for heading, _ in examples))
    return (
        figure,
        "The small base beside small + EGM with its reasoning. The places that the reasoning names "
        f"are numbered in order. Samples were drawn at random from: {kinds}.",
    )


def _reasoning(
    material: Material, row: Mapping, letters: int, per_line: int, size_pt: float
) -> list[tuple[str, str, int, float, str]]:
    """A row's reasoning with numbered steps, and what is wrong with them, as paragraphs."""
    reasoning, _ = reasoning_and_answer(row)
    steps = steps_of(row, material.objects(row))
    text = textwrap.shorten(numbered(reasoning or "(no reasoning)", steps), letters)
    wrong = [f"step {number}: {step.fault}" for number, step in enumerate(steps, 1) if step.fault]
    paragraphs = [(text, INK, per_line, size_pt, "normal")]
    if wrong:
        paragraphs.append((f"! {'; '.join(wrong)}", FAULT, per_line, size_pt, "normal"))
    return paragraphs


def fig4(material: Material) -> tuple[Figure, str]:
    """What EGM solves."""
    return _side_by_side(material, "vanilla", [("b solves what a misses", 3)])


def fig6(material: Material) -> tuple[Figure, str]:
    """Amodal grounding."""
    wanted = [("b solves what a misses", 2), ("b misses what a solves", 1)]
    return _side_by_side(material, "amodal", wanted)


def fig12(material: Material) -> tuple[Figure, str]:
    """Where EGM still fails."""
    return _side_by_side(material, "vanilla", [("b misses what a solves", 2), ("both miss", 2)])


def overview(material: Material) -> tuple[Figure, str]:
    """The image at the top of the README."""
    solved = material.with_outcome("vanilla", "b solves what a misses")
    if not solved:
        raise NotRun(f"no vanilla sample that {EGM} solves and {SMALL} misses")
    [sample] = sample_fixed(solved, 1)
    models = (SMALL, "small-direct-control", "small-sft", "small-sft-control", EGM, LARGE)
    values = {
        model: value
        for model in models
        if (value := estimate(material.results.of(model), over_splits=True, draws=DRAWS))
    }
    figure = new_figure(10.4, 3.3)
    first, text, bars = figure.subplots(1, 3, width_ratios=(1.15, 1.35, 1.25))
    boxes = [(sample.answers[model].box, style_of(model)) for model in (SMALL, EGM)]
    row = sample.answers[EGM].row
    steps = [(steps_of(row, material.objects(row)), style_of(EGM))]
    draw_image(first, sample.sample, boxes, material.root, steps=steps)
    direct, thought = (sample.answers[model].verdict for model in (SMALL, EGM))
    say(
        text,
        [
            (f"“{sample.sample['expression']}”", INK, 36, 11, "bold"),
            (f"small base answers at once: {direct}", FAILED, 50, 8.5, "bold"),
            (f"small + EGM thinks, then answers: {thought}", SOLVED, 50, 8.5, "bold"),
            *_reasoning(material, row, 330, 46, 8.5),
        ],
    )
    for y, (model, value) in zip(range(0, -len(values), -1), values.items(), strict=True):
        mean = 100 * value.mean
        bars.barh(y, mean, 0.66, color=style_of(model).colour)
        bars.errorbar(mean, y, xerr=down_up([value]), fmt="none", color=INK, linewidth=1)
        end = 100 * (value.ci95[1] if value.ci95 else value.mean)
        bars.text(end + 1.5, y, decimal_text(mean), va="center", fontsize=9)
    bars.set(
        yticks=range(0, -len(values), -1),
        yticklabels=[style_of(model).label for model in values],
        xlabel="accuracy at IoU > 0.5, %",
        xlim=(0, 108),
    )
    bars.tick_params(axis="y", length=0)
    bars.grid(True, axis="x")
    draw_legend(figure, [SMALL, EGM])
    caption = (
        "A small model that thinks before it points. The sample is drawn at random; accuracy is "
        "the mean over the splits, with 95 % intervals."
    )
    return figure, caption


def viewer(material: Material) -> tuple[Figure, str]:
    """The trace viewer as a still image: a sample, and a GRPO group where one was kept."""
    solved = [
        sample
        for task in ("amodal", "vanilla")
        for sample in material.with_outcome(task, "b solves what a misses")
    ]
    if not solved:
        raise NotRun(f"no sample that {EGM} solves and {SMALL} misses")
    [sample], width_in = sample_fixed(solved, 1), 9.2
    objects = material.objects(sample.sample)
    models = [model for model in (SMALL, EGM, LARGE) if model in sample.answers]
    heights_in = [0.42, comparison_height_in(sample, models, objects)]
    group = _mixed_group(material)
    if group:
        view = view_of(Comparison(group, {}), [], root=material.root, group=group)["group"]
        heights_in.append(group_height_in(view, group, width_in))
    figure = new_figure(width_in, sum(heights_in))
    bar, main, *below = figure.subfigures(len(heights_in), 1, height_ratios=heights_in)
    _controls(
        bar,
        [
            "‹",
            f"{solved.index(sample) + 1} of {len(solved)} (all: {len(material.comparisons)})",
            "›",
            "B solves what A misses",
            f"A {style_of(SMALL).label}",
            f"B {style_of(EGM).label}",
            "split: any",
            "sort: as read",
            "PNG",
            "SVG",
        ],
    )
    draw_comparison(main, sample, models, material.root, objects=objects)
    caption = "The trace viewer, at a sample drawn at random"
    if not group:
        return figure, f"{caption}."
    draw_group(below[0], view, group, material.root)
    return figure, f"{caption}. Below it: a GRPO group with rewards r and advantages A."


def _mixed_group(material: Material) -> Mapping | None:
    """One of the kept GRPO groups in which some completions hit and some miss."""
    folder = material.results.roots[0] / "groups"
    files = [folder / f"{task}.jsonl" for task in ("vanilla", "amodal")]
    groups = [group for file in files for group in read_groups(file)]
    mixed = [
        group
        for group in groups
        if group["rewards"] and min(group["rewards"]) < 0.5 < max(group["rewards"])
    ]
    return sample_fixed(mixed, 1)[0] if mixed else None


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
