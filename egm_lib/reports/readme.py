"""What README.md shows of the committed results: the image at its top, and the numbers.

`python -m egm_lib.reports.readme` writes both between their markers, from figures/mini-full or,
until that has been run, figures/mini. `python -m egm_lib.pipeline.publish` calls it.
"""

import sys
from pathlib import Path

from egm_lib.cli import ends
from egm_lib.errors import InputError
from egm_lib.evaluation.results import MODELS, paper, paper_mean, paper_models
from egm_lib.files import project_root, write_text
from egm_lib.reports.tables.cells import (
    cell_text,
    published,
    read_summary,
    stated_text,
    summarised,
)

PROFILES = ("mini-full", "mini")


def numbers(summary: dict | None) -> str:
    """The paper's numbers beside ours, as Markdown; a cell without a run says "not run"."""
    rows = {row["name"]: row for row in paper("table4")["rows"]}
    counterparts, _ = paper_models(summary["profile"] if summary else PROFILES[0])
    lines = ["| paper | accuracy | ours | accuracy | amodal |", "|---|---|---|---|---|"]
    for model in MODELS:
        theirs = counterparts.get(model)
        row = rows.get(theirs)
        mean = cell_text(published(paper_mean(row))) if row else ""
        ours = [_cell(summary, key, model) for key in ("acc_at_50", "amodal_acc_at_50")]
        lines.append(
            f"| {theirs or 'not in the paper'} | {mean} | `{model}` | {ours[0]} | {ours[1]} |"
        )
    if summary is None:
        return "\n".join(lines)
    seeds = ", ".join(map(str, summary["seeds"]))
    run = f"Profile {summary['profile']}, seeds {seeds}, revision {stated_text(summary['git'])}."
    return "\n".join([*lines, "", run])


def _cell(summary: dict | None, key: str, model: str) -> str:
    value = summary and summary[key].get(model)
    return cell_text(summarised(value))


def image(root: Path) -> str:
    """The overview figure, as an image of the README; nothing where it was not drawn."""
    path = committed(root).relative_to(root) / "overview.png"
    return f"![EGM at a glance: the miniature's results]({path})" if (root / path).exists() else ""


def committed(root: Path) -> Path:
    """The folder of results that the README shows: the first of PROFILES with a summary."""
    folders = [root / "figures" / name for name in PROFILES]
    return next((folder for folder in folders if (folder / "summary.json").exists()), folders[0])


def rewritten(text: str, block: str, content: str) -> str:
    """A README with `content` between the markers of a block. ValueError where a marker is
    missing.
    """
    begin, end = (
        f"<!-- {block}: written by `python -m egm_lib.reports.readme` -->",
        f"<!-- end of {block} -->",
    )
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise InputError(f"README.md must have the marker {marker} exactly once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def committed_readme(root: Path) -> str:
    """README.md with the image and the numbers of the committed results."""
    source = committed(root) / "summary.json"
    summary = read_summary(source)
    text = rewritten((root / "README.md").read_text(encoding="utf-8"), "image", image(root))
    return rewritten(text, "numbers", numbers(summary))


def main() -> int:
    root = project_root()
    return ends(lambda: write_text(root / "README.md", committed_readme(root)))


if __name__ == "__main__":
    sys.exit(main())
