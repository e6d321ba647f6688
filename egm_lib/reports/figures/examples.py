"""Figures that show samples with their answers."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure, SubFigure

from egm_lib.evaluation.statistics import estimate
from egm_lib.files import read_jsonl
from egm_lib.reports.figures.material import DRAWS, EGM, LARGE, SMALL, Material, NotRun, lot
from egm_lib.reports.figures.pieces import down_up, draw_legend, say
from egm_lib.reports.tables.cells import decimal_text
from egm_lib.viewer.comparison import Comparison, reasoning_and_answer
from egm_lib.viewer.drawing import (
    comparison_height_in,
    draw_comparison,
    draw_group,
    draw_image,
    group_height_in,
    text_width_pt,
    verdict,
)
from egm_lib.viewer.page import view_of
from egm_lib.viewer.palette import (
    FAILED,
    FAINT,
    GRID,
    INK,
    SOLVED,
    look,
    new_figure,
)


def fig3(material: Material) -> tuple[Figure, str]:
    rows = []
    for task in ("vanilla", "amodal"):
        file = material.results.roots[0] / "traces" / f"{task}.jsonl"
        if file.is_file():
            own = [
                row
                for row in read_jsonl(file)
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
        draw_image(axes[2 * place], row, [], material.root)
        axes[2 * place].set_title(f"{task}", fontsize=8, color=FAINT, fontweight="normal")
        say(
            axes[2 * place + 1],
            [
                (f"“{row['expression']}”", INK, 34, 8.5, "bold"),
                (row["reasoning"], INK, 36, 7.5, "normal"),
            ],
        )
    return (
        figure,
        "Curated reasoning: the target's box (hatched where hidden) and the trace that the teacher "
        "wrote.",
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
            draw_image(ax, each.sample, [(answer.box, look(model))], material.root)
            said = textwrap.shorten(verdict(answer), 34)
            ax.set_title(
                f"{look(model).label}: {said}",
                fontsize=8,
                color=SOLVED if answer.success else FAILED,
            )
        reasoning, _ = reasoning_and_answer(each.answers[EGM].row)
        lines.append((textwrap.shorten(reasoning or "(no reasoning)", 520), INK, 56, 7.5, "normal"))
        say(text, lines)
    draw_legend(figure, [SMALL, EGM])
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


def overview(material: Material) -> tuple[Figure, str]:
    """The image at the top of the README."""
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
    draw_image(first, each.sample, shown, material.root)
    reasoning, _ = reasoning_and_answer(each.answers[EGM].row)
    say(
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
            100 * value.mean, -place, xerr=down_up([value]), fmt="none", color=INK, linewidth=1
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
    draw_legend(figure, [SMALL, EGM])
    caption = (
        "A small model that thinks before it points. A sample drawn by lot; mean over the "
        "splits, 95 % intervals."
    )
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
    groups = [group for file in files if file.is_file() for group in read_jsonl(file)]
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
