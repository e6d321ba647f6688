"""One style for all figures: colours that the colour-blind tell apart (Okabe and Ito), and dashes
and markers for print in grey.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from egm_lib.files import atomic_open


@dataclass(frozen=True)
class Look:
    """How a model is drawn everywhere.

    dash: lengths on, off, ... in line widths; () is a solid line. marker: matplotlib's.
    """

    label: str
    colour: str
    dash: tuple[float, ...]
    marker: str


GROUND_TRUTH = Look("ground truth", "#111111", (), "s")
LOOKS = {
    "small-base": Look("small base", "#D55E00", (4, 2), "o"),
    "small-sft": Look("small + SFT", "#E69F00", (1.2, 1.2), "^"),
    "small-egm": Look("small + EGM", "#0072B2", (), "D"),
    "small-egm-no-reasoning": Look("EGM, no reasoning", "#56B4E9", (6, 1.5, 1.2, 1.5), "v"),
    "small-direct-control": Look("direct control", "#CC79A7", (2.5, 1), "<"),
    "small-sft-control": Look("SFT control", "#8C6D1F", (5, 1, 1, 1), ">"),
    "small-egm-unselected": Look("EGM, prompts at random", "#999999", (3, 1, 1, 1, 1, 1), "X"),
    "large-base": Look("large base", "#009E73", (7, 2), "P"),
    "huge-base": Look("huge base", "#4D4D4D", (1, 1), "h"),
    "reference": Look("reference", "#8A4FBF", (3, 1), "X"),
}
_SPARE = (
    ("#D55E00", (4, 2), "o"),
    ("#0072B2", (), "D"),
    ("#009E73", (7, 2), "P"),
    ("#CC79A7", (1.2, 1.2), "^"),
)
INK, FAINT, GRID = "#222222", "#6B6B6B", "#DDDDDD"
SOLVED, FAILED = "#0072B2", "#D55E00"
FAULT = "#C2185B"  # around a step that is wrong
# Behind words of a trace; viewer.css has the same colours.
TINTS = {"place": "#CFE5F5", "alike": "#FBE3A6"}


VARIANT_DASHES = {"edited": (1, 1), "no reasoning": (6, 1.5, 1.2, 1.5)}


def style_of(model: str, index: int = 0) -> Look:
    """The look of a model of a run; any other model gets a spare one by its index in the list.

    A variant, such as "small-egm, edited", has its model's colour and a dash of VARIANT_DASHES.
    """
    name, _, variant = model.partition(", ")
    look = LOOKS.get(name) or Look(name, *_SPARE[index % len(_SPARE)])
    if variant not in VARIANT_DASHES:
        return look if name == model else replace(look, label=model)
    return replace(look, label=f"{look.label}, {variant}", dash=VARIANT_DASHES[variant])


STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.8,
    "legend.edgecolor": "white",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8,
    "figure.constrained_layout.h_pad": 0.07,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "egm",
}


def new_figure(width_in: float, height_in: float) -> Figure:
    """A figure in the house style, without pyplot's global state; call within `styled()`."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def styled():
    """Context in which figures are made and saved."""
    return mpl.rc_context(STYLE)


_NO_DATE = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None},
    "png": {"Software": None},
}


def save(figure: Figure, path: str | Path, dpi: int = 160) -> Path:
    """Writes a figure as .png, .pdf or .svg, whole or not at all.

    The same figure gives the same bytes. dpi: of a PNG, and of the rasterised parts of the others.
    Raises ValueError for another suffix.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in _NO_DATE:
        raise ValueError(
            f"cannot write {path.name}: use one of {', '.join(f'.{known}' for known in _NO_DATE)}"
        )
    with styled(), atomic_open(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=dpi, metadata=_NO_DATE[kind])
    return path
