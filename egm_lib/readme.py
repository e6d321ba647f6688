"""The numbers in README.md: paper beside ours, between two markers, from figures/mini-full/summary.json.

`python -m egm_lib.readme` rewrites them (`make tables PROFILE=mini-full` does).
"""

import json
import sys
from pathlib import Path

from egm_lib.data.records import atomic_open
from egm_lib.profile import project_root
from egm_lib.results import MODELS, paper, paper_models

BEGIN, END = "<!-- numbers: written by `python -m egm_lib.readme` -->", "<!-- end of numbers -->"
PROFILE = "mini-full"


def numbers(summary: dict | None) -> str:
    """The table as Markdown; a cell that was not run says so."""
    published = {row["name"]: row for row in paper("table4")["rows"]}
    counterparts, _ = paper_models(PROFILE)
    lines = ["| paper | accuracy | miniature | RefCOCO-like | amodal |", "|---|---|---|---|---|"]
    for model in MODELS:
        theirs = counterparts.get(model)
        row = published.get(theirs)
        mean = row and (row["mean_printed"] or round(row["mean_of_splits"], 1))
        ours = [_cell(summary, key, model) for key in ("acc_at_50", "amodal_acc_at_50")]
        lines.append(f"| {theirs or 'not in the paper'} | {mean or ''} | `{model}` | {ours[0]} | {ours[1]} |")
    if summary is None:
        return "\n".join(lines)
    seeds = ", ".join(map(str, summary["seeds"]))
    return "\n".join([*lines, "", f"Profile {summary['profile']}, seeds {seeds}, revision {summary['git']}."])


def _cell(summary: dict | None, key: str, model: str) -> str:
    value = summary and summary[key].get(model)
    if not value:
        return "not run"
    interval = "" if value["ci95"] is None else f" [{100 * value['ci95'][0]:.1f}, {100 * value['ci95'][1]:.1f}]"
    return f"{100 * value['mean']:.1f}{interval}"


def rewritten(text: str, table: str) -> str:
    """A README with the table between its markers. ValueError where a marker is missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md lacks its marker {BEGIN if BEGIN not in text else END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> int:
    path, source = project_root() / "README.md", project_root() / "figures" / PROFILE / "summary.json"
    summary = json.loads(source.read_text(encoding="utf-8")) if source.exists() else None
    text = rewritten(path.read_text(encoding="utf-8"), numbers(summary))
    with atomic_open(Path(path)) as file:
        file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
