"""Tables and their cells, written as Markdown for people, CSV for programs and LaTeX for papers."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from egm_lib.errors import InputError
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import Difference, Estimate
from egm_lib.files import read_json

NOT_RUN = "not run"  # ours: the files are absent
SHARES = ("acc_at_50", "amodal_acc_at_50", "differences")  # of summary.json, in 0..1
NOT_REPORTED = "not reported"  # the paper's: it does not give this number


def decimal_text(value: float, decimals: int = 1, signed: bool = False) -> str:
    """A number rounded half away from zero, as people do by hand: 49.05 becomes 49.1.

    (The double nearest to 49.05 is a little smaller, and would become 49.0.)
    """
    exact = Decimal(str(round(float(value), 9)))
    rounded = exact.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP) + 0  # + 0: no "-0.0"
    return f"{rounded:{'+' if signed else ''},f}"


@dataclass(frozen=True)
class Number:
    """A value with its interval, n and p where known; percents have one decimal, counts none."""

    value: float
    ci95: tuple[float, float] | None = None
    n: int | None = None
    p: float | None = None
    decimals: int = 1
    signed: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, self.texts()))

    def texts(self) -> tuple[str, str]:
        """The value, and its interval in brackets or nothing."""
        value, *ends = (
            decimal_text(number, self.decimals, self.signed)
            for number in (self.value, *(self.ci95 or ()))
        )
        return value, f"[{', '.join(ends)}]" if ends else ""


Cell = Number | str | None  # None: not run


@dataclass(frozen=True)
class Row:
    """A labelled row; source: "paper" | "ours" | "ours, gain" | ..."""

    label: str
    source: str
    cells: Sequence[Cell]


@dataclass
class Table:
    """name: the file's stem; every row has one cell a column."""

    name: str
    title: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def was_run(self) -> bool:
        """Whether any cell holds something: of ours, or of the paper's."""
        return any(cell not in (None, NOT_RUN, "") for row in self.rows for cell in row.cells)


def percent(value: Estimate | Difference | None, signed: bool = False) -> Cell:
    """An estimate in 0..1 as percent; a difference as signed points."""
    if value is None:
        return None
    ci95 = None if value.ci95 is None else (100 * value.ci95[0], 100 * value.ci95[1])
    is_difference = isinstance(value, Difference)
    p = value.p_value if is_difference else None
    return Number(100 * value.mean, ci95, value.n, p, signed=signed or is_difference)


def read_summary(path: Path) -> dict | None:
    """summary.json of `build_tables`; None if there is no file. Raises InputError for another
    shape.
    """
    advice = "make it again: python -m egm_lib.reports.tables"
    stated = read_json(path, advice)
    if stated is not None and not is_summary(stated):
        raise InputError(f"{path} is not a summary of results; {advice}")
    return stated


def is_summary(stated: object) -> bool:
    """Whether a JSON value is what summary.json holds, as far as it is shown."""
    kinds = {"profile": str, "seeds": list, **dict.fromkeys(SHARES, dict)}
    return (
        isinstance(stated, dict)
        and all(isinstance(stated.get(name), kind) for name, kind in kinds.items())
        and all(
            value is None or _is_share(value) for name in SHARES for value in stated[name].values()
        )
    )


def _is_share(value: object) -> bool:
    """Whether a value has a mean, an n, and an interval or null."""
    if not (isinstance(value, dict) and {"mean", "ci95", "n"} <= value.keys()):
        return False
    ends = [] if value["ci95"] is None else value["ci95"]
    return (
        isinstance(ends, list)
        and len(ends) in (0, 2)
        and all(isinstance(number, int | float) for number in (value["mean"], value["n"], *ends))
    )


def summarised(value: dict | None) -> Cell:
    """A mean as summary.json has it, as percent; None if it was not run."""
    return percent(Estimate(value["mean"], value["ci95"], value["n"])) if value else None


def published(value: float | None, decimals: int = 1) -> Cell:
    """A number of the paper."""
    return NOT_REPORTED if value is None else Number(value, decimals=decimals)


def count(value: int | None) -> Cell:
    return None if value is None else Number(value, decimals=0)


def p_text(p: float | None) -> Cell:
    return None if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}")


def cell_text(cell: Cell) -> str:
    return NOT_RUN if cell is None else str(cell)


def to_markdown(table: Table, stamp: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "/") for text in cells) + " |"

    title = table.name.replace("table", "Table ").replace("_", ": ", 1).capitalize()
    lines = [
        f"# {title}. {table.title}",
        "",
        line(["", "source", *table.columns]),
        line(["---"] * (len(table.columns) + 2)),
    ]
    lines += [line([row.label, row.source, *map(cell_text, row.cells)]) for row in table.rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in [*table.notes, stamp])])


def to_csv(table: Table, results: Results) -> str:
    """One line a cell, so that a program need not take brackets apart."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "table",
            "row",
            "source",
            "column",
            "value",
            "low",
            "high",
            "n",
            "p",
            "rule",
            "profile",
            "seeds",
            "git",
        ]
    )
    run = [
        results.rule,
        results.profile,
        " ".join(map(str, results.seeds)),
        stated_text(results.stated("git")),
    ]
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if isinstance(cell, Number):
                low, high = cell.ci95 or ("", "")
                numbers = [cell.value, low, high]
                values = [
                    f"{value:.6g}" if isinstance(value, float) else value for value in numbers
                ]
                extra = [
                    "" if value is None else value for value in (cell.n, cell.p and f"{cell.p:.6g}")
                ]
            else:
                values, extra = [cell_text(cell), "", ""], ["", ""]
            writer.writerow([table.name, row.label, row.source, column, *values, *extra, *run])
    return buffer.getvalue()


_LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"$<$",
        ">": r"$>$",
        "|": r"$|$",
    }
)


def to_latex(table: Table, stamp: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(text.translate(_LATEX) for text in cells) + r" \\"

    notes = " ".join([*table.notes, stamp]).translate(_LATEX)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{table.title.translate(_LATEX)}}}",
        rf"\begin{{tabular}}{{ll{'r' * len(table.columns)}}}",
        r"\toprule",
        line(["", "source", *table.columns]),
        r"\midrule",
        *(line([row.label, row.source, *map(cell_text, row.cells)]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\par\smallskip\footnotesize {notes}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def stated_text(value) -> str:
    """What manifests state, as one line; a list where runs state different things."""
    if isinstance(value, list):
        return ", ".join(map(stated_text, value))
    if value is None:
        return "not recorded"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
