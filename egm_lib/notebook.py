"""What every notebook does to show something: tables from files, figures from files, a training log as curves."""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.patches import Rectangle

from egm_lib.data import open_image, resolve_image
from egm_lib.data.records import atomic_open
from egm_lib.profile import Run
from egm_lib.tables import build_tables

BOXES = (("gt_box", "#009E73", "-"), ("modal_box", "#009E73", "--"), ("box", "#D55E00", "-"))  # colour-blind-safe


def show_tables(run: Run, *names: str) -> None:
    """Rebuilds tables (such as "table4") from the files of all seeds that were run, and shows them."""
    evaluation = run.profile.evaluation
    build_tables(run.roots, run.figures, rule=evaluation.rule, draws=evaluation.bootstrap_samples, only=names)
    for name in names:
        display(Markdown((run.figures / f"{name}.md").read_text(encoding="utf-8")))


def show_pictures(*paths: Path, width_px: int = 760) -> None:
    """Shows PNG files; one that is not there is said to be not run."""
    for path in paths:
        display(Image(path, width=width_px) if path.exists() else Markdown(f"`{path.stem}`: not run"))


def show_samples(samples: Iterable[Mapping], root: Path) -> None:
    """Pictures in a row: ground truth green (dashed: its visible part), a prediction's box orange."""
    samples = list(samples)
    if not samples:
        return
    figure, axes = plt.subplots(1, len(samples), figsize=(3 * len(samples), 3.5), squeeze=False, layout="constrained")
    for axis, sample in zip(axes[0], samples, strict=True):
        axis.imshow(open_image(resolve_image(sample, root)))
        for name, colour, style in BOXES:
            if (box := sample.get(name)) is not None:
                corner, sides = box[:2], (box[2] - box[0], box[3] - box[1])
                axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linestyle=style, linewidth=2))
        axis.set_title(textwrap.fill(sample["expression"], 36), fontsize=8)
        axis.axis("off")
    display(figure)
    plt.close(figure)


def plot_logs(logs: Mapping[str, Path], columns: Sequence[str]) -> None:
    """A panel a column, a line a log (JSONL of a training); a column that no log has is left out."""
    frames = {name: pd.DataFrame(read_jsonl(path)) for name, path in logs.items() if path.exists()}
    shown = [column for column in columns if any(column in frame for frame in frames.values())]
    if not shown:
        display(Markdown("Training log: not run"))
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 2.8), squeeze=False, layout="constrained")
    for axis, column in zip(axes[0], shown, strict=True):
        for name, frame in frames.items():
            rows = frame[frame[column].notna()] if column in frame else frame.iloc[:0]
            axis.plot(rows["step"] if len(rows) else [], rows[column] if len(rows) else [], label=name)
        axis.set(title=column, xlabel="step")
    axes[0][0].legend(frameon=False)
    display(figure)
    plt.close(figure)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> int:
    """Writes rows to a JSONL file, whole or not at all; returns their number."""
    count = 0
    with atomic_open(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
