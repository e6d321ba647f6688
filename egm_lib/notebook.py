"""What every notebook does to show something: tables, figures, samples, training logs, findings."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from egm_lib.data import eval_splits, split_id
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.roofline import device_of
from egm_lib.evaluation.scoring import load_predictions, score
from egm_lib.reports import efficiency
from egm_lib.reports.figures import build_figures
from egm_lib.reports.figures.curves import TASKS, training_log
from egm_lib.reports.findings import findings
from egm_lib.reports.tables import build_tables
from egm_lib.reports.tables.cells import to_markdown
from egm_lib.run import Run
from egm_lib.viewer.drawing import draw_image
from egm_lib.viewer.palette import new_figure, style_of, styled
from egm_lib.viewer.still import figure_bytes, light_png


def scored(run: Run, model: str, task: str = "vanilla") -> pd.DataFrame:
    """The model's predictions on the splits of a task, with IoU and success; this seed alone."""
    files = [run.predictions(model, split_id(*pair)) for pair in eval_splits(task)]
    return score(load_predictions(files), run.profile.evaluation.rule)


def show_findings(run: Run, *topics: str) -> None:
    """What we see, in sentences made from the numbers of all seeds that were run."""
    evaluation = run.profile.evaluation
    results = Results(run.roots, evaluation.rule, evaluation.bootstrap_samples)
    for topic in topics:
        display(Markdown(findings(results, topic)))


def show_tables(run: Run, *names: str) -> None:
    """Rebuilds tables (such as "table4") from the files of all seeds, and shows them."""
    evaluation = run.profile.evaluation
    draws = evaluation.bootstrap_samples
    build_tables(run.roots, run.figures, rule=evaluation.rule, draws=draws, only=names)
    for name in names:
        display(Markdown((run.figures / f"{name}.md").read_text(encoding="utf-8")))


def show_figures(run: Run, *names: str, width_px: int = 820) -> None:
    """Redraws figures (such as "fig5") from the files of all seeds; shows them with captions."""
    for drawn in build_figures(
        run.roots, run.figures, rule=run.profile.evaluation.rule, only=names
    ):
        if drawn.not_run:
            display(Markdown(f"*{drawn.title}*: not run ({drawn.not_run})"))
        else:
            png = (run.figures / f"{drawn.name}.png").read_bytes()
            display(Image(light_png(png), width=width_px))
            display(Markdown(f"*{drawn.title}.* {drawn.caption}"))


def show_efficiency(*names: str, gpu: str = "L20", width_px: int = 820) -> None:
    """Tables and figures of efficiency (such as "planner") on a device; no run is needed."""
    device = device_of(gpu)
    for name in names:
        if name in efficiency.TABLES:
            table = efficiency.TABLES[name](device)
            display(Markdown(to_markdown(table, efficiency.STAMP)))
        if name in efficiency.FIGURES:
            with styled():
                figure, caption = efficiency.FIGURES[name](device)
                show(figure, width_px=width_px)
            display(Markdown(caption))


def show_samples(samples: Iterable[Mapping], root: Path) -> None:
    """Images in a row with the ground truth, its hidden part hatched.

    A prediction row also shows the model's box.
    """
    samples = list(samples)
    if not samples:
        return
    with styled():
        figure = new_figure(2.9 * len(samples), 3.8)
        for axis, sample in zip(
            figure.subplots(1, len(samples), squeeze=False)[0], samples, strict=True
        ):
            answers = [(sample["box"], style_of(sample["model"]))] if "box" in sample else []
            draw_image(axis, sample, answers, root)
            axis.set_title(textwrap.fill(sample["expression"], 34), fontsize=8, fontweight="normal")
        show(figure)


def plot_logs(logs: Mapping[str, Path], columns: Sequence[str]) -> None:
    """A panel for each column, a line for each training log (JSON lines).

    A column that no log has is left out.
    """
    frames = {name: training_log(path) for name, path in logs.items() if path.exists()}
    shown = [column for column in columns if any(column in frame for frame in frames.values())]
    if not shown:
        display(Markdown("Training log: not run"))
        return
    with styled():
        figure = new_figure(2.9 * len(shown), 2.6)
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, column in zip(axes, shown, strict=True):
            for name, frame in frames.items():
                if column in frame:
                    colour, line = TASKS.get(name, (None, "-"))
                    rows = frame[frame[column].notna()]
                    look = {"color": colour, "marker": "o" if len(rows) < 10 else None}
                    axis.plot(rows["step"], rows[column], line, label=name, **look)
            axis.set(title=column, xlabel="step")
        axes[0].legend()
        show(figure)


def show(figure: Figure, width_px: int | None = None) -> None:
    """A figure as a PNG, in whatever shows this notebook. width_px: shown so wide, and sharper."""
    image = figure_bytes(figure, "png", dpi=80 if width_px is None else 130)
    display(Image(light_png(image), width=width_px))
