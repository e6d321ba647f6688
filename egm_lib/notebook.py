"""What every notebook does to show something: tables from files, figures from files, a training log as curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, Markdown, display

from egm_lib.data.records import atomic_open
from egm_lib.profile import Run
from egm_lib.tables import build_tables


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


def write_jsonl(path: Path, rows) -> int:
    """Writes rows to a JSONL file, whole or not at all; returns their number."""
    count = 0
    with atomic_open(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
