"""Efficiency at true scale: the roofline against measurements, Fig. 5 under several protocols,
and which EGM model to take. No run and no model is needed.

    python -m egm_lib.reports.efficiency [--gpu L20] [--only planner]

Tables (Markdown, LaTeX) and figures (PNG, PDF) go to figures/efficiency/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from egm_lib.errors import InputError
from egm_lib.evaluation.roofline import Device, device_of
from egm_lib.files import project_root, write_text
from egm_lib.reports.efficiency import figures, tables
from egm_lib.reports.tables.cells import Table, to_latex, to_markdown
from egm_lib.viewer.palette import save, styled

OUT = project_root() / "figures" / "efficiency"
TABLES: dict[str, Callable[[Device], Table]] = {
    "fig5_protocols": tables.protocols,
    "fig5_latencies": tables.latencies,
    "fig5_tokens": tables.tokens,
    "planner": tables.planner,
    "roofline": tables.roofline,
    "roofline_points": tables.points,
    "measured": tables.measured,
}
FIGURES: dict[str, Callable[[Device], tuple[Figure, str]]] = {
    "fig5_protocols": figures.protocols,
    "planner": figures.planner,
    "roofline": figures.roofline,
}


def build_efficiency(
    out_dir: Path = OUT, *, gpu: str = "L20", only: Sequence[str] = ()
) -> dict[str, list[Path]]:
    """Writes all tables and figures, or those named; returns the files of each name.

    gpu: the planner's device. Raises InputError for an unknown name.
    """
    names = list(dict.fromkeys([*TABLES, *FIGURES]))
    if unknown := set(only) - set(names):
        raise InputError(
            f"unknown name {', '.join(sorted(unknown))}: use one of {', '.join(names)}"
        )
    device, written = device_of(gpu), {}
    for name in only or names:
        written[name] = []
        if name in TABLES:
            table = TABLES[name](device)
            for suffix, text in (("md", to_markdown), ("tex", to_latex)):
                path = Path(out_dir) / f"{name}.{suffix}"
                write_text(path, text(table, STAMP))
                written[name].append(path)
        if name in FIGURES:
            with styled():
                figure, caption = FIGURES[name](device)
            for suffix in ("png", "pdf"):
                written[name].append(save(figure, Path(out_dir) / f"{name}.{suffix}"))
            captions = Path(out_dir) / f"{name}.caption.txt"
            write_text(captions, caption + "\n")
            written[name].append(captions)
    return written


STAMP = "Predicted times are the roofline's: docs/efficiency.md says how far to trust them."
