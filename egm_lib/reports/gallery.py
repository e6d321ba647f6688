"""gallery.html: one page with results, figures and traces that opens from disk in any browser.

    python -m egm_lib.reports.gallery --profile mini

Nothing is fetched: images are in the page, and the viewer's own script draws the traces.
"""

import argparse
import base64
import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import egm_lib.viewer
from egm_lib.cli import ends, run_parser, runs_of
from egm_lib.errors import InputError
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import sample_fixed
from egm_lib.files import atomic_open, read_json
from egm_lib.reports.figures.material import (
    EGM,
    LARGE,
    SMALL,
    Material,
    data_root,
    outcome_title,
)
from egm_lib.reports.tables.cells import NOT_REPORTED, NOT_RUN, read_summary, summarised
from egm_lib.viewer.comparison import OUTCOMES, models_in
from egm_lib.viewer.page import page_script, view_of
from egm_lib.viewer.palette import style_of

DASH = "–"  # shown for NOT_REPORTED, which would make columns wide
DRAWN = {"name", "title", "caption", "not_run"}  # what figures.json says of each
REDRAW = "draw the figures again: python -m egm_lib.reports.figures"
TRACES_A_KIND = 6  # there are up to eight kinds; so the page stays at about 5 MB
TABLES = (
    "table4",
    "table4_differences",
    "table5",
    "table1",
    "table9",
    "table10",
    "table11",
    "table4_latency",
)


def build_gallery(
    run_roots: Sequence[Path],
    figures_dir: Path,
    out_html: Path,
    *,
    root: Path | None = None,
    rule: str = "egm",
) -> Path:
    """Writes the page from the runs' predictions and the tables and figures in figures_dir.

    Up to TRACES_A_KIND traces of each kind and task are drawn at random, always the same ones. What
    is absent is shown as not run. Returns the path of the page.
    """
    results, figures_dir, out_html = Results(run_roots, rule), Path(figures_dir), Path(out_html)
    material = Material(results, root or data_root(results), {})
    title = f"EGM: profile {results.profile}, {'seed' if len(results.seeds) == 1 else 'seeds'} "
    title += ", ".join(map(str, results.seeds))
    here = Path(egm_lib.viewer.__file__).parent
    drawn = read_json(figures_dir / "figures.json", REDRAW, shape=list) or []
    if not all(isinstance(figure, dict) and figure.keys() >= DRAWN for figure in drawn):
        raise InputError(f"{figures_dir / 'figures.json'} is not a list of figures; {REDRAW}")
    page = _PAGE.format(
        title=html.escape(title),
        style=(here / "viewer.css").read_text(encoding="utf-8") + _STYLE,
        headline=_headline(read_summary(figures_dir / "summary.json")),
        # The viewer itself is in the page: its still image is left out.
        figures="\n".join(
            _figure(figure, figures_dir) for figure in drawn if figure["name"] != "viewer"
        )
        or '<p class="not-run">Figures: not run (python -m egm_lib.reports.figures)</p>',
        tables="\n".join(_table(figures_dir / f"{name}.md") for name in TABLES),
        traces=_script_safe(json.dumps(_traces(material), ensure_ascii=False, allow_nan=False)),
        viewer=page_script("viewer").replace("export default { render };", ""),
        pager=_PAGER,
    )
    with atomic_open(out_html) as file:
        file.write(page)
    return out_html


def _traces(material: Material) -> dict:
    """Kinds of samples with their views, and the images; a view holds the number of its image."""
    kinds, numbers = [], {}
    for task in ("vanilla", "amodal"):
        models = [model for model in models_in(material.of(task)) if model in (SMALL, EGM, LARGE)]
        for outcome in OUTCOMES:
            samples = material.with_outcome(task, outcome)
            views = [
                view_of(
                    sample,
                    models,
                    root=material.root,
                    objects=material.objects(sample.sample),
                    max_side_px=480,
                )
                for sample in sample_fixed(samples, TRACES_A_KIND)
            ]
            for view in views:
                if view["image"]:
                    view["image"] = numbers.setdefault(view["image"], len(numbers))
            if views:
                kind = outcome_title(outcome)
                kinds.append({"kind": kind, "task": task, "of": len(samples), "views": views})
    return {"kinds": kinds, "images": list(numbers)}


def _script_safe(text: str) -> str:
    """JSON that cannot end its script element."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _headline(summary: dict | None) -> str:
    if summary is None:
        return '<p class="not-run">Summary: not run (python -m egm_lib.reports.tables)</p>'
    names = [name for name in (SMALL, "small-sft", EGM, LARGE) if name in summary["acc_at_50"]]
    cells = []
    for name in names:
        shown = [
            f"<dt>{label}</dt><dd>{_percent(summary[key].get(name))}</dd>"
            for label, key in (("RefCOCO splits", "acc_at_50"), ("amodal", "amodal_acc_at_50"))
        ]
        label = html.escape(style_of(name).label)
        cells.append(f'<div class="fact {name}"><h3>{label}</h3><dl>{"".join(shown)}</dl></div>')
    note = '<p class="small">Accuracy at IoU &gt; 0.5, percent; 95 % intervals.</p>'
    return f'<div class="facts">{"".join(cells)}</div>{note}'


def _percent(value: dict | None) -> str:
    if value is None:
        return '<span class="not-run">not run</span>'
    mean, interval = summarised(value).texts()
    return f"{mean} {interval and f'<small>{interval}</small>'}"


def _figure(drawn: dict, folder: Path) -> str:
    """A figure of figures.json, its PNG within the page."""
    title, file = html.escape(drawn["title"]), folder / f"{drawn['name']}.png"
    if drawn["not_run"] or not file.is_file():
        reason = drawn["not_run"] or f"no file {file.name}"
        return f'<p class="not-run">{title}: not run ({html.escape(reason)})</p>'
    data = base64.b64encode(file.read_bytes()).decode()
    caption = html.escape(drawn["caption"])
    return (
        f'<figure><h3>{title}</h3><div class="scroll"><img alt="{caption}" '
        f'src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(path: Path) -> str:
    """A Markdown table of egm_lib.reports.tables as HTML; all but the first are folded."""
    if not path.is_file():
        return f'<p class="not-run">{html.escape(path.stem)}: not run (python -m egm_lib.reports.tables)</p>'
    title, rows, notes = path.stem, [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            title = line[2:]
        elif re.fullmatch(r"\|[\s|:-]+\|", line):
            continue
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif line.strip():
            notes.append(line)

    def cells(row: Sequence[str], tag: str) -> str:
        faint = {NOT_RUN: ' class="not-run"', NOT_REPORTED: ' title="not reported"'}
        return "".join(
            f"<{tag}{faint.get(cell, '')}>{DASH if cell == NOT_REPORTED else html.escape(cell)}</{tag}>"
            for cell in row
        )

    head = f"<tr>{cells(rows[0], 'th')}</tr>" if rows else ""
    ours = [" class='ours'" if row[1:2] == ["ours"] else "" for row in rows]
    body = "".join(
        f"<tr{mark}>{cells(row, 'td')}</tr>" for mark, row in zip(ours[1:], rows[1:], strict=True)
    )
    if any(NOT_REPORTED in row for row in rows):
        notes.append(f"{DASH}: the paper does not report this number.")
    below = "".join(f'<p class="small">{html.escape(note)}</p>' for note in notes)
    opened = " open" if path.stem == TABLES[0] else ""
    return (
        f"<details{opened}><summary>{html.escape(title)}</summary>"
        "<div "
        f'class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{below}</details>'
    )


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; color: #222; background: #fff; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 16px; }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0; } h2 { font-size: 21px; margin: 34px 0 8px; } h3 { font-size: 15px; margin: 0 0 4px; }
nav a { margin-right: 14px; color: #0059A0; } a:focus-visible, button:focus-visible, summary:focus-visible { outline: 2px solid #0072B2; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 10px; margin: 14px 0 4px; }
.fact { border: 1px solid #ddd; border-top: 5px solid #888; border-radius: 6px; padding: 8px 12px; }
.fact.small-base { border-top-color: #D55E00; } .fact.small-sft { border-top-color: #E69F00; }
.fact.small-egm { border-top-color: #0072B2; } .fact.large-base { border-top-color: #009E73; }
.fact dl { display: grid; grid-template-columns: auto auto; justify-content: space-between; margin: 0; font-size: 14px; }
.fact dt { color: #666; } .fact dd { margin: 0; text-align: right; font-weight: 650; font-variant-numeric: tabular-nums; }
.fact small { font-weight: 400; color: #666; display: block; white-space: nowrap; } .small, figcaption { font-size: 13px; color: #555; margin: 4px 0; }
.not-run { color: #777; font-style: italic; }
figure { margin: 22px 0; } figure img { width: 100%; height: auto; display: block; }
details { border-top: 1px solid #ddd; padding: 6px 0; } body summary { cursor: pointer; font-weight: 600; }
.egm-viewer details { border: 0; padding: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { vertical-align: bottom; white-space: normal; min-width: 5em; border-bottom: 1px solid #999; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; } tr.ours td { font-weight: 600; }
.kinds { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0; }
.kinds button { font: inherit; font-size: 14px; padding: 5px 10px; border: 1px solid #bbb; border-radius: 16px; background: #fff; cursor: pointer; }
.kinds button[aria-pressed="true"] { background: #0072B2; border-color: #0072B2; color: #fff; }
@media (max-width: 520px) {
  main { padding: 10px; } h1 { font-size: 22px; } .egm-viewer { padding: 8px; } figure img { min-width: 620px; }
  th:first-child, td:first-child { white-space: normal; min-width: 8em; max-width: 38vw; overflow-wrap: anywhere; }
}
"""  # noqa: E501

# A stand-in for the kernel: the viewer's script talks to it as it talks to Python in a notebook.
_PAGER = """
const { kinds, images } = JSON.parse(document.getElementById("traces").textContent);
const state = { index: 0, filter: {}, sort: "", hidden: [], choices: {}, view: {}, count: 0, total: 0 }, heard = {};
let views = [];
const tell = (name) => (heard[`change:${name}`] ?? []).forEach((callback) => callback());
const show = () => {
  Object.assign(state, { view: views[state.index] ?? {}, count: views.length, total: views.length });
  tell("view");
};
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; if (name === "index") show(); else tell(name); },
  save_changes: () => {}, send: () => {},
  on: (name, callback) => { (heard[name] ??= []).push(callback); }, off: () => {},
};
const chips = document.getElementById("kinds");
const choose = (place) => {
  views = kinds[place].views.map((view) => ({ ...view, image: images[view.image] }));
  state.index = 0;
  [...chips.children].forEach((chip, number) => chip.setAttribute("aria-pressed", String(number === place)));
  show();
};
if (kinds.length) {
  kinds.forEach(({ kind, task, of }, place) => chips.append(
    html("button", { type: "button", onclick: () => choose(place) }, `${task}: ${kind} (${of})`)));
  choose(0);
  render({ model, el: document.getElementById("viewer") });
} else {
  document.getElementById("viewer").append(html("p", { class: "not-run" }, "Traces: not run"));
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>A small vision-language model that reasons in writing before it points: what that changes, and where it still fails.</p>
<nav><a href="#traces-title">Traces</a><a href="#figures">Figures</a><a href="#tables">Tables</a></nav>
{headline}
<h2 id="traces-title">Traces</h2>
<p class="small">Drawn at random from all samples of a kind (their number in brackets). Use the arrow keys to page, and the
keys <kbd>,</kbd> and <kbd>.</kbd> to reveal the reasoning step by step. Point at a model, a numbered place or a word to
highlight it. Tinted: <mark style="background:#CFE5F5">places</mark> and
<mark style="background:#FBE3A6">counts and look-alikes</mark>.</p>
<div class="kinds" id="kinds"></div>
<div id="viewer"></div>
<h2 id="figures">Figures</h2>
{figures}
<h2 id="tables">Tables</h2>
{tables}
</main>
<script type="application/json" id="traces">{traces}</script>
<script type="module">
{viewer}
{pager}
</script>
</body>
</html>
"""


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("reports.gallery", "One page to look through.", seed=False)
    args = parser.parse_args(argv)
    return ends(lambda: _write(args))


def _write(args: argparse.Namespace) -> None:
    runs = runs_of(args)
    folder, rule = runs[0].figures, runs[0].profile.evaluation.rule
    print(build_gallery([run.root for run in runs], folder, folder / "gallery.html", rule=rule))


if __name__ == "__main__":
    sys.exit(main())
